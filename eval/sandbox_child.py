"""What runs inside the sandbox: shuts the doors behind itself, then executes a program that nobody trusts.

    python -I sandbox_child.py FOLDER < {"source": ..., "token": ..., limits}

After the doors are shut (nothing of it can be undone from inside): limits on processor time, memory, file size and
open files; writing only below FOLDER and reading only there and in what Python needs (Landlock); no sockets, no new
processes, no signals to others, no change of rights or owners (seccomp). The token on stdout says that the program ran
to its end.
Standard library only, Linux only; eval.sandbox starts it.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys

UNSUPPORTED = 71  # exit status: this machine has no such doors

# Landlock: rights of its first version (5.13), those that later ones add, and which of all are for reading.
READ = (1 << 0) | (1 << 2) | (1 << 3)  # execute, read file, read directory
RIGHTS_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
FILE_RIGHTS = (1 << 0) | (1 << 1) | (1 << 2) | (1 << 14)
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all architectures

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_DUMPABLE, SECCOMP_MODE_FILTER = 38, 22, 4, 2
ALLOW, ERRNO_EPERM, ERRNO_ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
LOAD, EQUAL, GREATER_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
CLONE_THREAD = 0x00010000
# System calls that fail: name, number on x86-64 and on aarch64 (-: it has none).
DENIED = """
socket 41 198, socketpair 53 199, connect 42 203, accept 43 202, bind 49 200, listen 50 201, sendto 44 206,
sendmsg 46 211, fork 57 -, vfork 58 -, execve 59 221, kill 62 129, tkill 200 130, tgkill 234 131,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, reboot 169 142,
kexec_load 246 104, init_module 175 105, finit_module 313 273, delete_module 176 106, swapon 167 224,
swapoff 168 225, sethostname 170 161, setdomainname 171 162, settimeofday 164 170, clock_settime 227 112,
adjtimex 159 171, clock_adjtime 305 266, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282,
setns 308 268, unshare 272 97, setrlimit 160 164, prlimit64 302 261, execveat 322 281, chmod 90 -,
fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
utimes 235 -, utimensat 280 88, futimesat 261 -, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, keyctl 250 219, add_key 248 217,
request_key 249 218, io_uring_setup 425 425, io_uring_enter 426 426, pidfd_open 434 434,
pidfd_send_signal 424 424, pidfd_getfd 438 438, setuid 105 146, setgid 106 144, setpriority 141 140,
sched_setscheduler 144 119, shmget 29 194, msgget 68 186, semget 64 190, memfd_create 319 279,
mlockall 151 230, acct 163 89, quotactl 179 60, syslog 103 116, open_by_handle_at 304 265, ioperm 173 -,
iopl 172 -, fchmodat2 452 452
"""
MACHINES = {"x86_64": (0xC000003E, 1, 56), "aarch64": (0xC00000B7, 2, 220)}  # audit name, column above, clone
CLONE3, X32 = 435, 0x40000000

libc = ctypes.CDLL(None, use_errno=True)


class Unsupported(Exception):
    """A door that this machine does not have."""


def call(number: int, *arguments: object) -> int:
    """A system call. Raises Unsupported when the kernel refuses it."""
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise Unsupported(f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def limit(seconds: int, memory: int, file_bytes: int) -> None:
    """Limits that no call below can raise again."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_NPROC: 64,  # root is not held by it: seccomp is what counts
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def confine_files(folder: str, readable: list[str]) -> None:
    """Landlock: writing below `folder` only, reading there and below `readable`."""
    abi = call(CREATE_RULESET, None, 0, 1)
    rights = RIGHTS_BY_ABI[min(abi, 5)]
    ruleset = call(CREATE_RULESET, ctypes.byref((ctypes.c_uint64 * 1)(rights)), 8, 0)
    allowed = [(folder, rights), *((path, READ) for path in readable), ("/dev/null", READ | 2), ("/dev/urandom", READ)]
    for path, wanted in allowed:
        if not os.path.exists(path):
            continue
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        given = wanted & rights if os.path.isdir(path) else wanted & rights & FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("<Qi", given, opened))
        call(ADD_RULE, ruleset, 1, rule, 0)
        os.close(opened)
    call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def confine_calls() -> None:
    """seccomp: the calls above fail, and so does clone unless it makes a thread."""
    if platform.machine() not in MACHINES:
        raise Unsupported(f"a {platform.machine()} processor")
    architecture, column, clone = MACHINES[platform.machine()]
    denied = [int(number) for number in (entry.split()[column] for entry in DENIED.split(",")) if number != "-"]
    program = [
        (LOAD, 0, 0, 4),  # the architecture
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
        (GREATER_EQUAL, 0, 1, X32),
        (RETURN, 0, 0, KILL),
        (EQUAL, 0, 1, CLONE3),  # its flags are behind a pointer; libraries then take clone
        (RETURN, 0, 0, ERRNO_ENOSYS),
    ]
    for number in denied:
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO_EPERM)]
    program += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, ERRNO_EPERM)]
    program.append((RETURN, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        raise Unsupported(f"seccomp: {os.strerror(ctypes.get_errno())}")


def main() -> int:
    """Shut the doors, run the program."""
    folder, wanted = sys.argv[1], json.load(sys.stdin)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(folder)
    import site

    readable = [sys.base_prefix, sys.prefix, *site.getsitepackages(), "/usr", "/lib", "/lib64"]
    try:
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise Unsupported("no_new_privs")
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        limit(wanted["seconds"], wanted["memory"], wanted["file_bytes"])
        confine_files(folder, readable)
        confine_calls()
    except (Unsupported, OSError, ValueError) as error:
        os.write(answer, str(error).encode())
        return UNSUPPORTED
    sys.setrecursionlimit(2000)
    try:
        exec(compile(wanted["source"], "program.py", "exec"), {"__name__": "__main__"})
    except BaseException:  # SystemExit as well: leaving early is not passing
        return 1
    os.write(answer, wanted["token"].encode())
    return 0


if __name__ == "__main__":
    os._exit(main())  # nothing that the program left behind runs after it
