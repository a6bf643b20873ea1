"""Reading files in stated ways, and what the kernel's page cache holds of them.

A mount may learn from how a program read before, and tells programs by their name; so each reader is a process of its own
and says what it is called.
"""
import json, os, resource, signal, subprocess, time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

numbers = count()


@dataclass
class Reading:
    """What was read, by all readers: bytes, requests, wall-clock seconds, CPU seconds of the readers."""
    bytes: int
    requests: int
    seconds: float
    cpu: float

    @property
    def megabytes(self):
        return self.bytes / 1e6 / self.seconds

    @property
    def rate(self):
        return self.requests / self.seconds


def stranger():
    """A program's name that no mount has seen."""
    # 15 characters are all a name may have.
    return f'r{os.getpid() % 100000}-{next(numbers)}'


# Smaller requests are made by programs that the mount takes for readers of small pieces.
LARGE = 64 << 10


def usual(request):
    """The name of a program that reads in such requests: one known for large ones, or one that nobody knows."""
    return 'cat' if request >= LARGE else stranger()


def call_myself(name):
    Path('/proc/self/comm').write_text(name)


def pass_once(path, request, seconds):
    """Reads from the start to the end, or until the time is over."""
    buffer = bytearray(request)
    at_once = max(1, (1 << 20) // request)
    total = 0
    with open(path, 'rb', buffering=0) as file:
        read, start = file.readinto, time.perf_counter()
        while True:
            for _ in range(at_once):
                got = read(buffer)
                total += got
            elapsed = time.perf_counter() - start
            if got < request or elapsed > seconds:
                return total, -(-total // request), elapsed


def run(job, name):
    """Does the job in a process called `name`."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        be_reader(job, name, theirs)
    os.close(theirs)
    with open(ours, 'rb') as pipe:
        try:
            said = pipe.read()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            os.waitpid(pid, 0)
    if not said:
        raise SystemExit('bench: a reader failed')
    return Reading(*json.loads(said))


def be_reader(job, name, pipe):
    """Does the job in a process that was forked for it, and ends."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        call_myself(name)
        before = resource.getrusage(resource.RUSAGE_SELF)
        found = job()
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        os.write(pipe, json.dumps([*found, cpu]).encode())
        os._exit(0)
    except BaseException as error:
        os.write(2, f'bench: reader: {error}\n'.encode())
        os._exit(1)


def sequential(path, request=1 << 20, seconds=60, name=None):
    return run(lambda: pass_once(path, request, seconds), name or usual(request))


def at_random(path, request, readers, seconds, within=None, core=None):
    """By fio, which takes little of the machine itself. What is cached is the caller's to drop: for fio the plain file
    would leave memory, too."""
    size = [f'--size={within}'] if within else []
    where = [] if core is None else [f'--cpus_allowed={core}']
    said = subprocess.run(
        ['fio', '--name=r', f'--filename={path}', '--ioengine=psync', '--rw=randread', f'--bs={request}', *size, *where,
         f'--numjobs={readers}', '--invalidate=0', '--time_based', f'--runtime={max(1, round(seconds))}',
         '--group_reporting', '--output-format=json', '--readonly', '--randseed=1', '--allow_file_create=0'],
        check=True, capture_output=True, text=True).stdout
    found = json.loads(said[said.index('{'):])['jobs'][0]
    used = (found['usr_cpu'] + found['sys_cpu']) / 100 * found['read']['runtime'] / 1000
    return Reading(found['read']['io_bytes'], found['read']['total_ios'], found['read']['runtime'] / 1000, used)


def habitual(path, request):
    """The name of a program that read a disk in requests so small or large before."""
    name = stranger()
    run(lambda: pass_some(path, request), name)
    return name


def pass_some(path, request):
    with open(path, 'rb', buffering=0) as file:
        requests = sum(1 for _ in range(32) if file.read(request))
    return requests * request, requests, 1


def drop(*paths):
    """Makes the kernel forget what it cached of files, and of all files below folders."""
    for path in map(Path, paths):
        for file in [path] if path.is_file() else path.rglob('*'):
            if file.is_file():
                fd = os.open(file, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(fd)


def use_memory(file, size):
    """Has the memory that the next program gets be in use just before: a virtual machine may have given it away."""
    with open(file, 'wb') as out:
        os.posix_fallocate(out.fileno(), 0, size)
    file.unlink()


def warm(*paths):
    """Has the kernel cache files, and all files below folders."""
    for path in map(Path, paths):
        for file in [path] if path.is_file() else path.rglob('*'):
            if file.is_file():
                pass_once(file, 1 << 20, 600)
