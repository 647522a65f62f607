"""What the kernel forbids a sandboxed process: resource limits, namespaces, Landlock, a seccomp filter.

Only the standard library and ctypes: this runs in the child (eval/sandbox/child.py), between its start and the first
line of foreign code. Every layer except the resource limits may be missing on a machine; each function returns whether
it took effect. Numbers and structures are those of the Linux user-space interface (linux/seccomp.h, linux/landlock.h,
asm/unistd.h); docs/sandbox.md says what each layer is for.
"""

import ctypes
import errno
import os
import resource
import struct
from collections.abc import Iterable, Sequence

LAYERS = ("namespaces", "landlock", "seccomp")  # those that a machine may lack

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_THREAD = 0x20000000, 0x40000000, 0x00010000
CLONE_NEWUTS, CLONE_NEW_ANY = 0x04000000, 0x7E020000  # any: all namespaces that clone can make
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
F_SETOWN, F_SETOWN_EX, TIOCSTI, FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR = 8, 15, 0x5412, 0x40086602, 0x401C5820
SIGKILL = 9

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # machine -> (column below, AUDIT_ARCH)
LAST_KNOWN_CALL = 462  # later ones (x32's too, which begin at 1 << 30) do not exist for a sandboxed program

# System call -> its number on (x86_64, aarch64); None where it does not exist.
DENIED = {
    # network
    "socket": (41, 198),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # other processes
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "tkill": (200, 130),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "personality": (135, 92),
    # memory that RLIMIT_AS does not count, or that outlives the process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "userfaultfd": (323, 282),
    # files, beyond what Landlock governs
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "quotactl": (179, 60),
    "fanotify_init": (300, 262),
    # the machine
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "capset": (126, 91),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setgroups": (116, 159),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "acct": (163, 89),
    "syslog": (103, 116),
    "vhangup": (153, 58),
}
DENIED_WRITES = {  # besides opening for writing
    "creat": (85, None),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "truncate": (76, 45),
}
CHECKED = {  # denied or not by their arguments
    "open": (2, None),
    "openat": (257, 56),
    "openat2": (437, 437),
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "prctl": (157, 167),
    "ioctl": (16, 29),
}
STARTS_PROCESSES = ("fork", "vfork", "execve")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Rights of Landlock's first version: bits 0 to 12; 13 (refer), 14 (truncate), 15 (device ioctl) came in 2, 3 and 5.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 15
ALLOWED_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_LIBC = ctypes.CDLL(None, use_errno=True)


def set_resource_limits(
    *, cpu_seconds: int, memory_bytes: int, file_bytes: int, open_files: int, processes: int
) -> None:
    """Lower the kernel's limits of this process, hard ones too, so that it cannot raise them again.

    `memory_bytes` limits the address space, `processes` all processes and threads of this user (no limit for root).
    """
    for which, limit in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(which)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


# ---------------------------------------------------------------------------------------------------------------------
# Namespaces


def enter_namespaces(*, second_user: int | None = None) -> bool:
    """Give this process its own network (without any device), processes, mounts and IPC; False where not permitted.

    The caller must be single-threaded and must fork once: only children are in the new process namespace. The user
    keeps its number, so that it may read the same files, but has no power over anything outside. With a `second_user`
    root can also change to that user's number, where permitted (become_user tries it).
    """
    wanted = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC
    if second_user is not None:
        wanted |= CLONE_NEWUTS
    if not hasattr(_LIBC, "unshare"):  # no such call outside Linux
        return False
    user, group = os.getuid(), os.getgid()
    if _can_map_user(user, group):
        mapper = _start_mapper(second_user) if user == 0 and second_user is not None else None
        is_in = _LIBC.unshare(CLONE_NEWUSER | wanted) == 0
        is_mapped = mapper is not None and _let_map(*mapper, is_in)
        if is_in and not is_mapped:
            _map_user(user, group)
        if is_in:
            return True
    return _LIBC.unshare(wanted) == 0  # root of a machine without user namespaces


def _start_mapper(second_user: int) -> tuple[int, int]:
    """A process that stays outside, to map root and a second user into the namespace that this one enters next.

    A process in a new user namespace may map no user but itself; only root outside it may do more. Returns the
    process and the pipe on which it waits for _let_map.
    """
    target, (read_end, write_end) = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(write_end)
            if os.read(read_end, 1) == b"1":
                for name in ("uid_map", "gid_map"):
                    with open(f"/proc/{target}/{name}", "w", encoding="ascii") as file:
                        file.write(f"0 0 1\n{second_user} {second_user} 1\n")
                os._exit(0)
        finally:
            os._exit(1)
    os.close(read_end)
    return helper, write_end


def _let_map(helper: int, pipe: int, is_in: bool) -> bool:
    os.write(pipe, b"1" if is_in else b"0")
    os.close(pipe)
    return os.waitpid(helper, 0)[1] == 0


def become_user(user: int) -> bool:
    """Change to another user for good; False where it is not permitted. Loses all capabilities."""
    try:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def _map_user(user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _can_map_user(user: int, group: int) -> bool:
    """Try a user namespace in a separate process. Some systems grant it and then refuse to map a user into it; a
    process in such a namespace has no user, cannot get out and cannot even read Python's library."""
    child = os.fork()
    if child == 0:
        try:
            if _LIBC.unshare(CLONE_NEWUSER) == 0:
                _map_user(user, group)
                os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def mount_memory_folder(folder: str, folder_bytes: int, *, mode: int = 0o700) -> bool:
    """Put a file system in memory of at most `folder_bytes` over `folder`, for this process only; False if refused.

    Nothing is mounted unless the mounts of this process could be made private: else the folder could show outside.
    """
    if _LIBC.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None) != 0:
        return False
    options = f"size={folder_bytes},nr_inodes=1024,mode={mode:o}".encode()
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    return _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0


def unmount_folder(folder: str) -> None:
    """Take away what mount_memory_folder put there, files and all."""
    _LIBC.umount2(os.fsencode(folder), MNT_DETACH)


def show_folder_at(folder: str, place: str) -> bool:
    """Let `folder` appear at `place` too, for this process and its children only; False if refused."""
    if _LIBC.unshare(CLONE_NEWNS) != 0:
        return False
    flags = ctypes.c_ulong(MS_BIND)
    return _LIBC.mount(os.fsencode(folder), os.fsencode(place), None, flags, None) == 0


def name_machine(name: str) -> None:
    """Set the host name that this process's own namespace sees (enter_namespaces with a second user).

    Outside such a namespace root would rename the whole machine.
    """
    if hasattr(_LIBC, "sethostname"):
        _LIBC.sethostname(name.encode("ascii"), ctypes.c_size_t(len(name)))


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends, however that happens."""
    _set_process_option(PR_SET_PDEATHSIG, SIGKILL)


def drop_privileges() -> bool:
    """No new rights for any program, no capabilities, memory closed to other processes; False outside Linux."""
    if not (_set_process_option(PR_SET_NO_NEW_PRIVS, 1) and _set_process_option(PR_SET_DUMPABLE, 0)):
        return False
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    return _LIBC.capset(header, nothing) == 0


def _set_process_option(option: int, value: int, more: int = 0) -> bool:
    if not hasattr(_LIBC, "prctl"):
        return False
    return _LIBC.prctl(option, *map(ctypes.c_ulong, (value, more, 0, 0))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Landlock


def restrict_files(readable: Iterable[str], writable: Sequence[str], executable: Sequence[str] = ()) -> bool:
    """Allow reading only below `readable`, everything but execution below `writable`; False where not supported.

    Programs may be started only below `executable`, which may also be read.

    Needs no privileges, but drop_privileges must come first. It also forbids TCP (from version 4) and signals to
    processes outside (from version 6).
    """
    if os.uname().sysname != "Linux":
        return False
    call = _LIBC.syscall
    version = call(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    file_rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0
    # A kernel accepts zeros in fields that it does not know.
    attributes = struct.pack("QQQ", file_rights, network, scoped)
    ruleset = call(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_DIR)
    for path in writable:
        _allow(ruleset, path, file_rights & ~EXECUTE & ~IOCTL_DEV)
    for path in executable:
        _allow(ruleset, path, READ_FILE | READ_DIR | EXECUTE)
    for path in ALLOWED_DEVICES:
        _allow(ruleset, path, READ_FILE | WRITE_FILE)
    is_restricted = call(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return is_restricted


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no permission
    if not os.path.isdir(path):  # a rule for a file may only name rights that files have
        rights &= READ_FILE | WRITE_FILE | EXECUTE
    rule = struct.pack("=Qi", rights, opened)
    _LIBC.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
    os.close(opened)


# ---------------------------------------------------------------------------------------------------------------------
# Seccomp


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_ushort),
        ("jump_true", ctypes.c_ubyte),
        ("jump_false", ctypes.c_ubyte),
        ("operand", ctypes.c_uint),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


LOAD, EQUAL, GREATER, ANY_BIT, RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # classic BPF
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16  # in struct seccomp_data


def filter_system_calls(*, deny_writes: bool, allow_processes: bool = False) -> bool:
    """Make the calls of DENIED fail with EPERM, from now on and irrevocably; False where not supported.

    Threads may be started, processes only with `allow_processes`; this process may signal only itself.
    With `deny_writes` no file can be made, changed, removed or opened for writing, wherever it is.
    """
    if os.uname().machine not in ARCHITECTURES or os.uname().sysname != "Linux":
        return False
    column, architecture = ARCHITECTURES[os.uname().machine]
    rows = filter_rows(column, architecture, os.getpid(), deny_writes=deny_writes, allow_processes=allow_processes)
    instructions = (_Instruction * len(rows))(*rows)
    program = _Program(len(rows), instructions)
    return _set_process_option(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def filter_rows(
    column: int, architecture: int, own_pid: int, *, deny_writes: bool, allow_processes: bool = False
) -> list[tuple[int, int, int, int]]:
    """The filter as rows (code, jump if true, jump if false, operand); jumps count rows to skip."""
    denied = DENIED | DENIED_WRITES if deny_writes else DENIED
    # A process that may leave its session or make namespaces could outlive the kill that ends its call.
    clone = ("clone", 0, (ANY_BIT, CLONE_THREAD), True)
    if allow_processes:
        denied = {name: numbers for name, numbers in denied.items() if name not in STARTS_PROCESSES}
        clone = ("clone", 0, (ANY_BIT, CLONE_NEW_ANY), False)
    rows = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (GREATER, 0, 1, LAST_KNOWN_CALL),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
    ]
    for name, numbers in denied.items():
        if numbers[column] is not None:
            # `touch` would fail if refused: it is told that the times are set, and nothing is done.
            answer = FAIL if allow_processes and name == "utimensat" else FAIL | errno.EPERM
            rows += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, answer)]
    for name in ("clone3", "openat2"):  # their arguments are in memory; the C library then takes clone and openat
        rows += [(EQUAL, 0, 1, CHECKED[name][column]), (RETURN, 0, 0, FAIL | errno.ENOSYS)]
    tests = [
        clone,
        ("kill", 0, (EQUAL, own_pid), True),
        ("tgkill", 0, (EQUAL, own_pid), True),
        ("prlimit64", 0, (EQUAL, 0), True),
        ("fcntl", 1, (EQUAL, F_SETOWN), False),
        ("fcntl", 1, (EQUAL, F_SETOWN_EX), False),
        ("prctl", 0, (EQUAL, PR_SET_PDEATHSIG), False),
        ("prctl", 0, (EQUAL, PR_SET_DUMPABLE), False),
        ("prctl", 0, (EQUAL, PR_SET_CHILD_SUBREAPER), False),
        ("ioctl", 1, (EQUAL, TIOCSTI), False),
        ("ioctl", 1, (EQUAL, FS_IOC_SETFLAGS), False),
        ("ioctl", 1, (EQUAL, FS_IOC_FSSETXATTR), False),
    ]
    if deny_writes:
        tests += [("open", 1, (ANY_BIT, WRITE_FLAGS), False), ("openat", 2, (ANY_BIT, WRITE_FLAGS), False)]
    for name, argument, (code, operand), is_allowed in tests:
        if CHECKED[name][column] is None:
            continue
        # For any other call skip all four; otherwise decide by the low half of the argument, then load the number
        # again.
        skip_if_true, skip_if_false = (1, 0) if is_allowed else (0, 1)
        rows += [
            (EQUAL, 0, 4, CHECKED[name][column]),
            (LOAD, 0, 0, ARGUMENTS_OFFSET + 8 * argument),
            (code, skip_if_true, skip_if_false, operand),
            (RETURN, 0, 0, FAIL | errno.EPERM),
            (LOAD, 0, 0, NUMBER_OFFSET),
        ]
    return [*rows, (RETURN, 0, 0, ALLOW)]
