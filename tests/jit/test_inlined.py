"""Headers as text: each once, in the branch of one family."""
from __future__ import annotations

import re

import pytest

from moe_xe.jit import inlined
from moe_xe.jit.inlined import renamed
from moe_xe.jit.shipped_sources import sources_dir


@pytest.fixture
def headers(monkeypatch):
    files = {
        "moe_xe/types.hpp": "#pragma once\n#include <sycl/some.hpp>\nTYPES",
        "moe_xe/top.hpp": "#pragma once\n#include <moe_xe/types.hpp>\n#include <moe_xe/part.hpp>\n#include <moe_xe/part.hpp>\n"
                          "#if defined(MOE_XE_CPU)\nCPU\n#elif defined(MOE_XE_XE)\n#include <moe_xe/xe.hpp>\n#else\n#include <moe_xe/xe.hpp>\nOTHER\n#endif\nTOP",
        "moe_xe/part.hpp": "PART", "moe_xe/xe.hpp": "XE",
    }
    monkeypatch.setattr(inlined, "_text", files.__getitem__)


@pytest.mark.parametrize("family, branch", [("CPU", ["CPU"]), ("XE", ["XE"]), ("GENERIC", ["XE", "OTHER"])])
def test_what_remains(family, branch, headers):
    words = renamed("down", family, ["PROBLEM"], ["CONFIG"], ["moe_xe/top.hpp", "moe_xe/part.hpp"]).split("\n")
    wanted = ["#define moe_xe down", "#include <sycl/some.hpp>", "TYPES", "namespace moe_xe::problem {", "PROBLEM", "}",
              "namespace moe_xe::config {", "CONFIG", "}", "PART", *branch, "TOP", "#undef moe_xe"]
    assert [word for word in words if word] == wanted


def test_shipped_headers_have_no_other_branches():
    """Such as this cannot take apart."""
    for header in (sources_dir() / "include").rglob("*.hpp"):
        directives = re.findall(r"^#(?:if|el|endif).*", header.read_text(), re.M)
        assert all(re.fullmatch(r"#(?:(?:el)?if defined\(MOE_XE_(?:CPU|XE|GENERIC)\)|else|endif)", line) for line in directives), header
