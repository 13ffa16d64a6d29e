"""The command line: moe-xe schedule | isa | bench | tune | cache | predict | quantize | devices | doctor."""
import typer

from . import bench, bench_ep, cache, devices, doctor, isa, predict, quantize, schedule, tune

app = typer.Typer(help="MoE GEMMs for Intel Xe GPUs and the SYCL CPU device.", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)
app.command("schedule")(schedule.schedule)
app.command("isa")(isa.isa)
app.command("devices")(devices.devices)
app.command("doctor")(doctor.doctor)
app.command("predict")(predict.predict)
app.command("quantize")(quantize.quantize)
app.command("tune")(tune.tune)
bench.app.command("ep")(bench_ep.ep)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
