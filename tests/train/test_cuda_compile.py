"""The shipped CUDA text compiles for three architectures to machine code that keeps its promises; no GPU needed.

Read from the compilers' own report: nothing spilled, registers, shared memory. Read from the PTX: every logit of a row
kernel is loaded and stored once, by 16 bytes. Mutants show that each of these gates can fail.
"""

import re

import pytest

from tests.support.device_code import (
    CompileError,
    Resources,
    ToolMissing,
    compile_with_nvcc,
    compile_with_nvrtc,
    ptx_of,
    read_resources,
)
from train.cuda.launch import ROW_KERNELS
from train.cuda.launch import SOURCE as KERNEL_FILE

README = KERNEL_FILE.parent / "README.md"
TEXT = KERNEL_FILE.read_text(encoding="ascii")
LOWEST_VIRTUAL = "compute_80"  # cvt.rn.bf16x2 is the first instruction that older devices lack
MAX_REGISTERS = 64  # 65,536 of a multiprocessor over the 1,024 threads that share it
MAX_SHARED_BYTES = 256  # two floats per warp of 32 warps
DTYPES = ("bf16", "fp16", "fp32")
SHAPES = tuple(f"{threads}x{vectors}" for threads, vectors in ROW_KERNELS)
BUILDS = [(compile_with_nvrtc, "sm_80"), (compile_with_nvrtc, "sm_90"), (compile_with_nvrtc, "sm_100")]
BUILDS += [(compile_with_nvcc, "sm_90")]


def entry_names() -> list[str]:
    names = [f"wce_row_{{}}_{shape}" for shape in SHAPES] + ["wce_stream_{}", "wce_scale_{}"]
    return [name.format(dtype) for name in names for dtype in DTYPES]


def or_skip(compiler, text: str, arch: str):
    """What the compiler makes of the text; the test is skipped where there is no such compiler."""
    try:
        return compiler(text, arch)
    except ToolMissing as error:
        pytest.skip(str(error))


def only(text: str, kernel: str) -> str:
    """The text without the other kernels' entry points: a mutant compiles in a fraction of a second."""
    dtype, shape = re.fullmatch(r"(?:row_)?(\w+?)_(\w+)", kernel).groups()
    threads, _, vectors = shape.partition("x")
    kept = f"ROW_KERNEL({dtype}, {dtype.capitalize()}, {threads}, {vectors})"
    lines = [
        line
        for line in text.splitlines()
        if not re.match(r"(ROW_KERNEL|STREAM_AND_SCALE_KERNELS)\(", line) or line == kept
    ]
    assert kept in lines, f"{KERNEL_FILE.name} has no line {kept}"
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Gates


def faults(found: dict[str, Resources], names: list[str]) -> list[str]:
    """What is wrong with the machine code; one text per fault."""
    result = []
    if set(found) != set(names):
        result.append(f"functions {sorted(set(found) ^ set(names))}: missing or not inlined")
    for name in sorted(set(names) & set(found)):
        resources = found[name]
        if resources.spill_bytes or resources.stack_bytes:
            result.append(f"{name} spills: {resources}")
        if resources.registers > MAX_REGISTERS:
            result.append(f"{name} registers: {resources.registers}, expected at most {MAX_REGISTERS}")
        if resources.shared_bytes > MAX_SHARED_BYTES:
            result.append(f"{name} shared: {resources.shared_bytes} bytes, expected at most {MAX_SHARED_BYTES}")
    return result


def faults_of_traffic(ptx: str) -> list[str]:
    """Row kernels whose unrolled text does not load and store each vector once, by 16 bytes.

    One store more is that of rows of weight 0, whose vectors are zeroed in a loop.
    """
    result = []
    for part in ptx.split(".visible .entry ")[1:]:
        if row := re.match(r"wce_row_\w+?_\d+x(\d+)\(", part):
            loads, stores = (len(re.findall(rf"{kind}\.global\.v4", part)) for kind in ("ld", "st"))
            if (loads, stores) != (int(row[1]), int(row[1]) + 1):
                result.append(f"{row[0]} traffic: {loads} loads and {stores} stores of 16 bytes for {row[1]} vectors")
    return result


@pytest.mark.parametrize(("compiler", "arch"), BUILDS)
def test_machine_code_keeps_its_promises(compiler, arch):
    assert not faults(or_skip(compiler, TEXT, arch), entry_names())


# ---------------------------------------------------------------------------------------------------------------------
# Text and PTX


def test_text_stands_alone():
    """NVRTC has no include path; doubles run at 1/64 of the speed on some devices."""
    assert "#include" not in TEXT.replace("no #include", "")
    assert max(map(len, TEXT.splitlines())) <= 120
    code = re.sub(r"//.*", "", TEXT)
    assert not re.search(r"\bdouble\b|\bprintf\b|\batomicAdd\b|\b\d+\.\d*(?![\df.]|e)", code)


def ptx() -> str:
    return or_skip(ptx_of, TEXT, LOWEST_VIRTUAL)


def test_rows_are_read_once_and_written_once_by_16_bytes():
    assert not faults_of_traffic(ptx())


def test_ptx_of_the_lowest_architecture():
    """What a device newer than the compiler gets: the driver makes machine code of it."""
    text = ptx()
    assert sorted(re.findall(r"\.visible \.entry (\w+)\(", text)) == sorted(entry_names())
    assert ".target sm_80" in text
    for word in (".f64", ".local", "call", "atom.global.add", "red.global.add", ".extern"):
        assert word not in re.sub(r"//.*", "", text), word


def test_parameters_in_the_ptx():
    """The launch passes bare 4- and 8-byte values: order and widths are the contract of train/cuda/csrc/README.md."""
    for name in entry_names():
        signature = re.search(rf"\.visible \.entry {name}\((.*?)\)", ptx(), re.DOTALL)[1]
        widths = re.findall(r"\.param \.[ubs](\d+)", signature)
        assert widths == (["64"] * 3 if "scale" in name else [*["64"] * 4, "32", *["64"] * 6]), name


def test_refusal_of_the_compiler_is_an_error_with_its_log():
    with pytest.raises(CompileError, match="compute_50: .*gpu-architecture"):
        or_skip(ptx_of, TEXT, "compute_50")


def test_nvcc_that_does_not_know_an_architecture_counts_as_missing():
    with pytest.raises(ToolMissing, match="nvcc"):
        compile_with_nvcc(TEXT, "sm_35")


# ---------------------------------------------------------------------------------------------------------------------
# Mutants

MUTANTS = {  # what is changed -> (kernel, pattern, replacement, word of the fault that must be reported)
    "registers halved": (
        "row_bf16_512x8",
        r"void __launch_bounds__\(threads, 1024 / threads\)",
        "void __launch_bounds__(threads, 2048 / threads)",
        "spills",
    ),
    "row read again for the gradient": (
        "row_bf16_512x8",
        r"(// 4\. Gradient.*?const int index = [^\n]*\n)",
        r"\1 if (index < n_vectors) vectors[k] = load_vector(row.logits, index);" + "\n",
        "traffic",
    ),
    "vectors loaded by halves": (
        "row_bf16_512x8",
        r"return reinterpret_cast<const Vector\*>\(start\)\[index\];",
        "const uint2* half = (const uint2*)start + 2 * index; return {{half->x, half->y, half[1].x, half[1].y}};",
        "traffic",
    ),
    "a whole row in shared memory": ("row_bf16_128x1", r"(float, warp_sums, THREADS) / 32", r"\1 * 8", "shared"),
    "function that is not inlined": (
        "row_bf16_128x1",
        r"__forceinline__ (void finish_row)",
        r"__noinline__ \1",
        "inlined",
    ),
}


def faults_of(text: str, kernel: str) -> list[str]:
    return faults(or_skip(compile_with_nvrtc, text, "sm_90"), [f"wce_{kernel}"]) + faults_of_traffic(
        or_skip(ptx_of, text, LOWEST_VIRTUAL)
    )


def test_unchanged_text_passes_alone():
    """Else a mutant could be caught for the cut that `only` makes."""
    for kernel in sorted({mutant[0] for mutant in MUTANTS.values()}):
        assert not faults_of(only(TEXT, kernel), kernel)


@pytest.mark.parametrize("change", MUTANTS)
def test_mutant_is_caught(change):
    kernel, pattern, replacement, word = MUTANTS[change]
    mutated, count = re.subn(pattern, replacement, only(TEXT, kernel), count=1, flags=re.DOTALL)
    assert count == 1, f"the text to change is gone: {pattern}"
    found = faults_of(mutated, kernel)
    assert any(word in fault for fault in found), found


# ---------------------------------------------------------------------------------------------------------------------
# The page, and the report


def test_shapes_are_those_of_the_text():
    table = re.findall(r"^//\s+wce_row_<dtype>_(\d+x\d+)", TEXT, re.MULTILINE)
    assert tuple(table) == SHAPES


def test_report_of_ptxas_by_hand():
    log = """
ptxas info    : Function properties for a
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
"""
    found = read_resources(log)
    assert [(one.registers, one.spill_bytes, one.stack_bytes, one.shared_bytes) for one in found.values()] == [
        (40, 16, 8, 128),
        (7, 0, 0, 0),
    ]


def test_page_says_that_nothing_ran_on_a_gpu():
    assert "We have not run these kernels on a GPU" in README.read_text(encoding="ascii")
