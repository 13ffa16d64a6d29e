"""README and docs run as written: their Python blocks are executed, and their commands, options and files exist.

What is replaced in a document's code stands in REPLACED: the device, sizes, and a hub's model by a tiny one of the same kind. What
its prose takes for granted (`hidden_states`, a `model`) stands in GIVEN. A document's blocks run in order, in a process of their own,
so that nothing is imported that a reader's program would not have.
"""
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moe_xe.cli import app
from moe_xe.quantized.folder import quantize_folder

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in
             (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / "examples").rglob("*.md"))]

TINY_QWEN, TINY_INT4 = "moe_xe_tiny_qwen3", "moe_xe_tiny_qwen3_int4"     # folders in which the test saved a model
REPLACED = {
    "README.md": [('"xpu"', '"cpu"'), ("8000, 2880", "320, 64"), ("5760, 2880", "96, 64"), ("(32,), 250", "(32,), 10"),
                  ("Qwen/Qwen3-30B-A3B", TINY_QWEN)],
    "docs/quantised-models.md": [('"xpu"', '"cpu"'), ("openai/gpt-oss-20b", TINY_INT4)],
    "docs/simulated-gpu.md": [("level_zero:gpu", "opencl:cpu")],
    "docs/training.md": [('"xpu"', '"cpu"')],
    "docs/transformers.md": [('"xpu"', '"cpu"'), ("Qwen/Qwen3-30B-A3B", TINY_QWEN)],
}
BLOCK = """
import torch
hidden_states = torch.randn(80, 64, dtype=torch.bfloat16, requires_grad=True)
w13 = torch.randn(16, 96, 64, dtype=torch.bfloat16, requires_grad=True)
w2 = torch.randn(16, 64, 48, dtype=torch.bfloat16, requires_grad=True)
router_logits, gradient = torch.randn(80, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(80, 64, dtype=torch.bfloat16)
"""
# What comes before a block, by its number in the document.
GIVEN = {
    "docs/distributed.md": {0: "import os\nos.environ.update(RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT='0')\n"},
    "README.md": {2: BLOCK, 3: "codes, scales = torch.zeros(16, 96, 32, dtype=torch.uint8), torch.full((16, 96, 2), 127, dtype=torch.uint8)\n"},
    "docs/tuning.md": {
        0: """
import torch, transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
a, w, tokens_per_expert = torch.randn(90, 64), torch.randn(2, 48, 64), torch.tensor([60, 30], dtype=torch.int32)
module = Qwen3MoeSparseMoeBlock(transformers.Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=48, num_experts=8))
""",
        1: BLOCK + """
topk_weights, topk_ids = moe_xe.route(router_logits, top_k=8)
"""},
    "docs/transformers.md": {1: """
import transformers
model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
    vocab_size=96, hidden_size=64, intermediate_size=48, intermediate_size_mlp=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, pad_token_id=0))
"""},
}
# What a reader would look at, at a document's end.
RESULTS = {
    "README.md": "assert out.isfinite().all() and all(t.grad.isfinite().all() for t in (hidden_states, w13, w2))\n"
                 "assert model(torch.arange(7)[None]).logits.isfinite().all() and model.config._experts_implementation == 'moe_xe'",
    "docs/distributed.md": "assert out.isfinite().all() and not overflow and d.tokens_per_expert.sum() == 320\ndist.destroy_process_group()",
    "docs/quantised.md": "assert out.isfinite().all() and all(p.grad.isfinite().all() for p in adapted.parameters())",
    "docs/quantised-models.md": "assert model.config.quantization_config.quant_method == 'moe_xe'\n"
                                "assert {name.split('.')[-2] for name, p in model.named_parameters() if p.requires_grad} == {'lora_A', 'lora_B'}",
    "docs/simulated-gpu.md": "assert out.isfinite().all()",
    "docs/training.md": "assert out.isfinite().all() and block(torch.randn(3, 64, dtype=torch.bfloat16)).isfinite().all()",
    "docs/tuning.md": "assert config.tile_width == 128 and out.isfinite().all()",
    "docs/transformers.md": "import torch\nassert model(torch.arange(7)[None]).logits.isfinite().all()\n"
                            "assert sum(isinstance(layer.feed_forward, Llama4Block) for layer in model.model.layers) == 1",
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def python_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(document), re.S | re.M)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("documentation")
    config = transformers.Qwen3MoeConfig(vocab_size=96, hidden_size=64, intermediate_size=80, moe_intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / TINY_QWEN)
    assert list(quantize_folder(folder / TINY_QWEN, folder / TINY_INT4, "int4", 16))
    return folder


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if python_blocks(document)])
def test_code_runs_as_written(document, folder):
    program = ""
    for number, block in enumerate(python_blocks(document)):
        program += GIVEN.get(document, {}).get(number, "") + f"# {document}, block {number}\n" + block
    for written, replacement in REPLACED.get(document, []):
        assert written in program, f"{document} has no {written} any more"
        program = program.replace(written, replacement)
    path = folder / f"program_of_{Path(document).stem}.py"
    path.write_text(program + RESULTS[document] + "\n")
    done = subprocess.run([sys.executable, path], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"MOE_XE_TUNE_SECONDS": "0", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr


def commands(document: str) -> set[str]:
    """What a reader would type: indented lines, and code in prose, tables and headings."""
    found = set()
    for line in text_of(document).splitlines():
        found.update(re.findall(r"`((?:moe-xe|python|make) [^`]+)`", line))
        if match := re.match(r"    ((?:[A-Z_]+=\S+ )*(?:moe-xe|python|make) .*)$", line):
            found.update(part.strip() for part in match[1].split(" #")[0].split(";"))
    return found


def parse(command, words: list[str]) -> None:
    """Raises typer's usage errors for commands, options and values that it does not know; runs nothing."""
    name, *arguments = words
    if hasattr(command, "commands"):
        assert arguments and arguments[0] in command.commands, f"{name} has no command {' '.join(arguments[:1])}"
        parse(command.commands[arguments[0]], [f"{name} {arguments[0]}", *arguments[1:]])
    elif arguments and arguments != ["--help"]:     # a name alone may leave out what is required
        command.make_context(name, arguments)


def command_of(function) -> object:
    """What typer.run makes of it."""
    example = typer.Typer()
    example.command()(function)
    return typer.main.get_command(example)


def check(command: str) -> None:
    """Raises an exception that says what is not there."""
    words = [word for word in shlex.split(command.split(" > ")[0]) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "moe-xe":
        parse(typer.main.get_command(app), words)
    elif words[0] == "make":
        assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M), f"the Makefile has no {words[1]}"
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"there is no module {words[2]}"
    elif words[1].startswith("examples/"):
        parse(command_of(runpy.run_path(str(ROOT / words[1]))["main"]), words[1:])


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands(document)])
def test_commands_exist(document):
    for command in commands(document):
        try:
            check(command)
        except Exception as error:
            pytest.fail(f"{document}: `{command}`: {type(error).__name__}: {error}")


@pytest.mark.parametrize("command", ["moe-xe tunes", "moe-xe tune --tokes 3", "moe-xe bench", "make tests",
                                     "python examples/moe_gemm.py --dtype int8", "python -m moe_xe.isa.count", "python examples/moe.py",
                                     "python examples/moe_gemm.py --iteration 3", "moe-xe cache list tuned.json"])
def test_wrong_commands_are_found(command):
    with pytest.raises(Exception):
        check(command)


FILES = [path.relative_to(ROOT).as_posix() for folder in ("moe_xe", "sycl_kernels", "tests", "tools", "examples", "benchmarks", "docs", ".ci")
         for path in (ROOT / folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    """A name in code style that looks like a source file is the end of a file's path."""
    names = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|cpp|hpp|yaml|json|md))`", text_of(document))
    missing = [name for name in names if not any(f"/{path}".endswith(f"/{name}") for path in FILES)]
    assert not missing
