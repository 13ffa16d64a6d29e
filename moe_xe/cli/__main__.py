from . import app

app(prog_name="moe-xe")
