"""Hostile programs for the sandbox of unit_tests. Each is bounded by itself, so that a sandbox that fails cannot harm the machine.

In a program, OUTSIDE is a folder of the test with a file `secret`, PORT a TCP port of a listener of the test on loopback, and VICTIM
the id of a process of the test. A program that succeeds in something writes "DONE", so the reason is "another output"; the reason
that is expected is of the attempt that failed. `call` programs are tested by `assert f(2) == 4`, `program` ones must write "right".
"""

CPU = "more than 1 s of CPU time"
KILLED = "AssertionError|ended by SIGKILL|the program ended|PermissionError|ProcessLookupError"
FLOOD = "more than 1048576 bytes of output"
HOSTILE: list[tuple[str, str, str, str]] = [
    ("fork bomb", "program", """
import os, time
for _ in range(200):
    if not os.fork():
        time.sleep(2); os._exit(0)
print("DONE")
""", "BlockingIOError"),
    ("fork bomb of the children's children", "program", """
import os, time
depth = 0
for _ in range(7):
    try:
        os.fork()
    except OSError:
        break
time.sleep(2)
print("DONE")
""", "another output"),
    ("threads", "program", """
import threading, time
for _ in range(200):
    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()
print("DONE")
""", "RuntimeError"),
    ("memory", "program", "a = bytearray(2 << 30)\nprint('DONE')", "MemoryError"),
    ("memory in pieces", "program", "a = [bytes(1 << 20) for _ in range(2048)]\nprint('DONE')", "MemoryError"),
    ("memory of a mapping", "program", "import mmap\na = mmap.mmap(-1, 2 << 30)\nprint('DONE')", "OSError"),
    ("endless loop", "program", "import time\nend = time.time() + 20\nwhile time.time() < end: pass", CPU),
    ("endless loop in a call", "call", """
import time
def f(x):
    end = time.time() + 20
    while time.time() < end: pass
    return 5
""", CPU),
    ("sleep", "program", "import time\ntime.sleep(20)\nprint('DONE')", "more than 3 s"),
    ("sleep in a call", "call", "import time\ndef f(x):\n    time.sleep(20)\n    return 5", "more than 3 s"),
    ("handler of SIGXCPU", "program", """
import signal, time
signal.signal(signal.SIGXCPU, lambda *_: None)
end = time.time() + 20
while time.time() < end: pass
print("DONE")
""", CPU),
    ("raise limits", "program", """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
print("DONE")
""", "ValueError"),
    ("read a file outside", "program", "print('DONE', open(OUTSIDE + '/secret').read())", "FileNotFoundError"),
    ("write a file outside", "program", "open(OUTSIDE + '/new', 'w').write('x')\nprint('DONE')", "FileNotFoundError"),
    ("symbolic link to outside", "program", """
import os
os.symlink(OUTSIDE + "/secret", "link")
print("DONE", open("link").read())
""", "FileNotFoundError"),
    ("dots to outside", "program", "print('DONE', open('../../../../..' + OUTSIDE + '/secret').read())", "FileNotFoundError"),
    ("write to the library", "program", """
import os
open(os.path.dirname(os.__file__) + "/owned.py", "w").write("x")
print("DONE")
""", "OSError|PermissionError"),
    ("read passwords", "program", "print('DONE', open('/etc/shadow').read() or open('/etc/passwd').read())", "FileNotFoundError"),
    ("environment of the parent", "program", """
import os
print("DONE", open(f"/proc/{os.getppid()}/environ", "rb").read())
""", "FileNotFoundError"),
    ("own environment", "program", "import os\nassert 'WHET_TEST_KEY' in os.environ\nprint('DONE')", "AssertionError"),
    ("connect to loopback", "program", """
import socket
socket.create_connection(("127.0.0.1", PORT), 2)
print("DONE")
""", "PermissionError"),
    ("datagram to loopback", "program", """
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT))
print("DONE")
""", "PermissionError"),
    ("abstract socket", "program", """
import socket
socket.socket(socket.AF_UNIX).connect(chr(0) + "whet-test-" + str(PORT))
print("DONE")
""", "ConnectionRefusedError|PermissionError"),
    ("kill the parent", "program", """
import os, signal
os.kill(os.getppid(), signal.SIGKILL)
print("DONE")
""", "another output|PermissionError"),
    ("kill a process outside", "program", """
import os, signal
os.kill(VICTIM, signal.SIGKILL)
print("DONE")
""", "ProcessLookupError|PermissionError"),
    ("kill all", "call", "import os, signal\nos.kill(-1, signal.SIGKILL)\ndef f(x): return 5", KILLED),
    ("kill the group", "program", "import os, signal\nos.killpg(0, signal.SIGKILL)\nprint('DONE')", "ended by SIGKILL|PermissionError"),
    ("flood of output", "program", "import os\nfor _ in range(50):\n    os.write(1, b'x' * (1 << 20))", FLOOD),
    ("flood of errors", "program", "import os\nfor _ in range(50):\n    os.write(2, b'x' * (1 << 20))", FLOOD),
    ("flood in a call", "call", "def f(x): return 'x' * (50 << 20)", "ValueError"),
    ("flood of the pipe of the tests", "call", """
import os
def f(x):
    for fd in range(3, 64):
        try:
            for _ in range(50):
                os.write(fd, b"x" * (1 << 20))
        except OSError:
            pass
    return 5
""", "the program ended"),
    ("daemon in a session of its own", "program", """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(20)
        os._exit(0)
    os._exit(0)
print("DONE")
""", "another output"),
    ("zombies", "program", """
import os
for _ in range(200):
    if not os.fork():
        os._exit(0)
print("DONE")
""", "BlockingIOError"),
    ("trace the parent", "program", """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.ptrace(16, os.getppid(), 0, 0) < 0:
    raise OSError(ctypes.get_errno(), "ptrace")
print("DONE")
""", "PermissionError"),
    ("write the memory of the parent", "program", """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(311, os.getppid(), 0, 0, 0, 0, 0) < 0:
    raise OSError(ctypes.get_errno(), "process_vm_writev")
print("DONE")
""", "PermissionError|OSError"),
    ("namespace of its own", "program", """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000) < 0:
    raise OSError(ctypes.get_errno(), "unshare")
print("DONE")
""", "PermissionError"),
    ("mount", "program", """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) < 0:
    raise OSError(ctypes.get_errno(), "mount")
print("DONE")
""", "PermissionError"),
    ("become root", "program", "import os\nos.setuid(0)\nprint('DONE')", "PermissionError"),
    ("execute another program", "program", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo DONE'])", "PermissionError"),
    ("remove the working folder", "program", """
import os, shutil
shutil.rmtree(os.getcwd(), ignore_errors=True)
os.chmod("/", 0o777)
print("DONE")
""", "OSError|PermissionError"),
    ("fill the disk", "program", """
for number in range(200):
    with open(f"a{number}", "wb") as file:
        file.write(bytes(1 << 20))
print("DONE")
""", "OSError"),
    ("one large file", "program", "with open('a', 'wb') as file:\n    file.truncate(1 << 30)\nprint('DONE')", "OSError|ended by SIGXFSZ"),
    ("many files", "program", "for number in range(10000):\n    open(f'a{number}', 'w').close()\nprint('DONE')", "OSError"),
    ("many open files", "program", "import os\nfor _ in range(1000):\n    os.dup(1)\nprint('DONE')", "OSError"),
    ("shared memory", "program", """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
if libc.shmget(0, 1 << 20, 0o1600) < 0:
    raise OSError(ctypes.get_errno(), "shmget")
print("DONE")
""", "PermissionError"),
    ("memory without a limit", "program", "import os\nos.memfd_create('a')\nprint('DONE')", "PermissionError"),
    ("recursion", "call", """
import sys
sys.setrecursionlimit(10 ** 9)
def f(x): return f(x)
""", f"ended by SIGSEGV|RecursionError|MemoryError|{CPU}"),
    ("recursion of literals", "program", "eval('(' * 5000 + ')' * 5000)", "MemoryError|SyntaxError|ended by SIGSEGV|RecursionError"),
    ("regular expression", "call", "import re\ndef f(x): return re.match('(a|aa)+$', 'a' * 60 + 'b') or 5", CPU),
    ("read standard input", "program", "import sys\nsys.stdin.read()\nprint(input())", "EOFError"),
    ("exit before the tests", "call", "import os\nos._exit(0)", "the program ended"),
    ("exit in a call", "call", "import os\ndef f(x): os._exit(0)", "the program ended"),
    ("sys.exit", "call", "import sys\nsys.exit(0)", "SystemExit"),
    ("sys.exit in a call", "call", "import sys\ndef f(x): sys.exit(0)", "SystemExit"),
    ("an object that equals everything", "call", """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def f(x): return Any(5)
""", "AssertionError"),
    ("an object that equals everything and is no number", "call", """
class Any:
    def __eq__(self, other): return True
    def __req__(self, other): return True
    __hash__ = None
def f(x): return Any()
""", "AssertionError"),
    ("AssertionError replaced", "call", """
import builtins
class Quiet(Exception): pass
builtins.AssertionError = AssertionError = Quiet
def f(x): return 5
""", "AssertionError"),
    ("print the verdict", "call", """
import os
for fd in (1, 2, 3):
    try:
        os.write(fd, b'1\\n""\\n')
    except OSError:
        pass
print('1\\n""')
def f(x): return 5
""", "AssertionError"),
    ("answer for the tests", "call", """
import json, os
def send(message):
    data = json.dumps(message).encode()
    os.write(5, len(data).to_bytes(4, "big") + data)
send({"names": {"f": {"h": 0, "name": "f", "kinds": []}}})
for _ in range(10):
    send({"value": True, "changed": {"0": 4}})
def f(x): return 5
""", "AssertionError|the program ended"),
    ("an error without a name at the start", "call", """
import json, os
data = json.dumps({"error": [""]}).encode()
os.write(5, len(data).to_bytes(4, "big") + data)
import time
time.sleep(1)
""", "an error"),
    ("an error without a name", "call", """
class Nameless(Exception): pass
Nameless.__name__ = ""
def f(x): raise Nameless
""", "an error|Exception"),
    ("an error with the name of a passed test", "call", """
Null = type("null", (Exception,), {})
def f(x): raise Null
""", "null"),
    ("trace hooks and garbage", "call", """
import gc, sys, threading
def hook(frame, event, arg):
    for name in list(frame.f_locals):
        frame.f_locals[name] = ""
    return hook
sys.settrace(hook)
threading.settrace(hook)
sys.setprofile(hook)
for one in gc.get_objects():
    if isinstance(one, dict) and "reason" in one:
        one["reason"] = ""
frame = sys._getframe()
while frame:
    frame.f_locals.update(reason="", kind="test", count=0)
    frame = frame.f_back
def f(x): return 5
""", "AssertionError|the program ended"),
    ("import of the harness", "call", """
import sys
for name, module in list(sys.modules.items()):
    if "whet" in name or name == "json":
        for attribute in list(vars(module)):
            if callable(vars(module)[attribute]):
                setattr(module, attribute, lambda *a, **k: "")
def f(x): return 5
""", "the program ended|AssertionError|TypeError"),
    ("atexit", "call", """
import atexit, os
atexit.register(lambda: os.write(1, b'1\\n""\\n'))
def f(x): return 5
""", "AssertionError"),
    ("writes through ctypes", "call", """
import ctypes, sys
for number in (4, 5):
    ctypes.memset(id(number) + 24, number ^ 1, 1)
def f(x): return 5
""", "AssertionError|the program ended|TypeError|ended by SIGSEGV|ended by SIGABRT|SystemError|ValueError"),
    ("builtins of the tests", "call", "def all(x): return True\ndef int(x): return 4\ndef f(x): return 5", "AssertionError"),
    ("nice and pauses", "program", "import os\nos.nice(-20)\nprint('DONE')", "PermissionError|OSError"),
    ("all signals blocked", "program", """
import signal, time
for one in range(1, 65):
    try:
        signal.signal(one, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
time.sleep(20)
print("DONE")
""", "more than 3 s"),
    ("stop itself", "program", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('DONE')", "more than 3 s|PermissionError"),
    ("a deep value", "call", "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a", "ValueError|RecursionError"),
]  # fmt: skip
