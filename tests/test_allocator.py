import subprocess
import sys

CODE = """
import ctypes, resource
from bitjax.allocator import reuse_freed_memory
assert reuse_freed_memory() is {reuse}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def touch():
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_block_freed_and_allocated_again_costs_no_page_faults():
    import ctypes

    if not hasattr(ctypes.CDLL(None), "mallopt"):  # not glibc
        faults(CODE.format(reuse=False))
        return
    untuned = CODE.replace("assert reuse_freed_memory() is {reuse}", "")
    assert faults(untuned) > 1000  # 64 MiB are 16384 pages, or fewer huge ones
    assert faults(CODE.format(reuse=True)) < 100
