"""Triton kernels compiled for GPUs that are not here, by a process of its own: the tests' own interprets them."""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

SHARED = {80: 166_912, 89: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may have, by compute capability."""


@dataclass(frozen=True)
class Build:
    """A kernel ("module.name") and what it is specialized for; names that the kernel does not have are passed over.

    types: of parameters that are not i32, names by type: {"*bf16": "q k v"}. unaligned: integers that need not be
    multiples of 16, as the others and all addresses are.
    """

    kernel: str
    warps: int
    constants: dict[str, Any]
    types: dict[str, str]
    unaligned: str = ""


def usage(capability: int, builds: dict[str, Build]) -> dict[str, dict[str, int]]:
    """What each takes: registers and bytes spilled a thread, shared memory, loads of 4 bytes and more in its PTX."""
    compiler = _compiler()
    print(json.dumps([capability, {name: asdict(build) for name, build in builds.items()}]), file=compiler.stdin)
    compiler.stdin.flush()
    answer = compiler.stdout.readline()
    if not answer:
        _compiler.cache_clear()
        raise AssertionError(f"the compiler ended with {compiler.wait()} at one of {list(builds)}; it says why above")
    found, error = json.loads(answer)
    assert error is None, error[-2000:]
    return found


def cubin_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers a thread and bytes that it spills, and a block's static shared memory, by triton's cuobjdump."""
    import triton

    (folder / "cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True)
    words = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", done.stdout))
    return {"registers": int(words["REG"]), "spilled": int(words["STACK"]), "shared": int(words["SHARED"])}


@functools.cache
def _compiler() -> Any:
    """One process for all of a run's builds: it answers each line, and imports torch and triton once."""
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, __file__], text=True, env=environment, **pipes)
    atexit.register(process.communicate)
    return process


def compiled(capability: int, build: Build) -> Any:
    """What `triton.compile` makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = build.kernel.rsplit(".", 1)
    kernel = getattr(import_module(module), name)
    # JSON has no tuples, and Triton takes no lists.
    given = {n: tuple(x) if isinstance(x, list) else x for n, x in build.constants.items()}
    constants = {n: given[n] for n in kernel.arg_names if n in given}
    types = {name: kind for kind, names in build.types.items() for name in names.split()}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    apart = {n for n, kind in signature.items() if kind in ("constexpr", "fp32")} | set(build.unaligned.split())
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in apart}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": build.warps})


def _measured(built: Any) -> dict[str, int]:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    words = dict(w.split(":")[:2] for w in text.split() if w.count(":") == 1 and w.split(":")[1].isdigit())
    wide = sum(built.asm["ptx"].count(f"ld.global.{x}") for x in ("b32", "v2.b32", "v4.b32"))
    found = {"registers": int(words["REG"]), "spilled": int(words["STACK"])}
    return found | {"shared": built.metadata.shared, "wide_loads": wide}


def _answer(capability: int, builds: dict[str, Any]) -> tuple[dict[str, dict[str, int]] | None, str | None]:
    try:
        return {name: _measured(compiled(capability, Build(**given))) for name, given in builds.items()}, None
    except Exception:  # noqa: BLE001  the test that asked is to show it
        return None, traceback.format_exc()


if __name__ == "__main__":
    # What Triton prints is no answer.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(_answer(*json.loads(line))), file=answers, flush=True)
