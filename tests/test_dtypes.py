"""Which dtype text is generated with, depending on the CPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtj_loader
from mtj_loader import dtypes
from mtj_loader.api import options_for_generation, plan_source
from mtj_loader.options import LoadOptions, Source
from tests.support import neox

X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f {}\nbogomips\t: 5000.00\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm {}\nCPU part\t: 0xd4f\n"


@pytest.fixture
def cpu_info(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file in place of /proc/cpuinfo, which does not exist yet."""
    monkeypatch.setattr(dtypes, "_CPU_INFO", tmp_path / "cpuinfo")
    dtypes.has_bfloat16_arithmetic.cache_clear()
    yield tmp_path / "cpuinfo"
    dtypes.has_bfloat16_arithmetic.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format(""), False),
        (X86.format("avx512_bf16"), True),
        (X86.format("amx_bf16 amx_tile"), True),
        (X86.format("avx512_bf16x"), False),
        (ARM.format(""), False),
        (ARM.format("bf16 dgh"), True),
        ("model name\t: with bf16\n", False),
        ("", False),
    ],
)
def test_bfloat16_arithmetic_is_a_flag_of_the_cpu(cpu_info: Path, text: str, expected: bool):
    cpu_info.write_text(text)
    assert dtypes.has_bfloat16_arithmetic() is expected


@pytest.mark.usefixtures("cpu_info")
def test_an_unknown_cpu_has_no_bfloat16_arithmetic():
    assert not dtypes.has_bfloat16_arithmetic()
    assert options_for_generation(LoadOptions()).dtype == "float32"
    for dtype in ("bfloat16", "float16", "float32"):
        options = LoadOptions(dtype=dtype)
        assert options_for_generation(options) is options


def test_auto_stays_where_there_is_bfloat16_arithmetic(cpu_info: Path):
    cpu_info.write_text(X86.format("avx512_bf16"))
    assert options_for_generation(LoadOptions()) == LoadOptions()


def test_the_plan_counts_the_memory_of_the_chosen_dtype(cpu_info: Path, tmp_path: Path):
    folder = neox.write(tmp_path / "model")
    cpu_info.write_text(X86.format(""))
    chosen = options_for_generation(LoadOptions())
    wide = plan_source(Source(folder), chosen, "mp=1")
    assert wide.device_bytes == 2 * mtj_loader.plan(folder, "mp=1").device_bytes


@pytest.mark.usefixtures("cpu_info")
def test_generate_warns_once_of_bfloat16(tmp_path: Path):
    folder = neox.write(tmp_path / "model")
    model = mtj_loader.load(folder, "mp=1", progress=False)
    with pytest.warns(UserWarning, match="load with dtype='float32'"):
        model.start([1, 2], max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.start([1, 2], max_new_tokens=1)


@pytest.mark.usefixtures("cpu_info")
def test_generate_does_not_warn_of_a_dtype_that_was_chosen(tmp_path: Path):
    folder = neox.write(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtj_loader.load(folder, "mp=1", progress=False, dtype="bfloat16").start(
            [1], max_new_tokens=1
        )
