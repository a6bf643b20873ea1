"""The ways to read a disk that are compared, and the processes behind them."""
import os, socket, subprocess, sys, time
from pathlib import Path

TICKS = os.sysconf('SC_CLK_TCK')


class Target:
    """One way to read a disk: `path` is the file to read, `servers` the processes that serve it; stop() unmounts."""

    def __init__(self, name, path, sources, servers=(), stop=lambda: None):
        self.name, self.path, self.sources, self.servers, self.stop = name, path, sources, servers, stop

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def cpu(self):
        """CPU seconds its servers have used so far."""
        fields = [Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split() for pid in self.servers]
        return sum(int(field[11]) + int(field[12]) for field in fields) / TICKS

    def bind(self, cores):
        """Has its servers run on these cores."""
        for pid in self.servers:
            for thread in Path(f'/proc/{pid}/task').iterdir():
                try:
                    os.sched_setaffinity(int(thread.name), cores)
                except ProcessLookupError:
                    pass

    def peak(self):
        """The most memory its servers had, in MiB: the peak of the resident set, pages of files included."""
        lines = [line for pid in self.servers for line in Path(f'/proc/{pid}/status').read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 1024


class SlowPath(Target):
    """A folder passed through by tests/passthrough, whose commands are at the top of its source."""

    def ask(self, command):
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile('rw') as lines:
            connection.connect(os.fspath(self.control))
            lines.write(f'{command}\n')
            lines.flush()
            answer = lines.readline().strip()
        if answer.startswith('error'):
            sys.exit(f'bench: passthrough: {command}: {answer}')
        return answer


def start(command, **options):
    # Ctrl-C is for us alone: we end what we started, in the right order. Of xofs's log, tables have no use.
    options = {'stdin': subprocess.DEVNULL, **options}
    return subprocess.Popen(command, start_new_session=True, env={**os.environ, 'XOFS_LOG': 'warn'}, **options)


def wait_for(ready, what, server=None, seconds=60):
    end = time.monotonic() + seconds
    while not ready():
        if server and server.poll() is not None:
            sys.exit(f'bench: {what} ended with {server.returncode}')
        if time.monotonic() > end:
            if server:
                server.kill()
            sys.exit(f'bench: {what} was not ready within {seconds} s')
        time.sleep(0.002)


def end(server):
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def detach(mount):
    """Unmounts what another left, and removes the folder."""
    for _ in range(50):
        if not os.path.ismount(mount):
            break
        if subprocess.run(['fusermount3', '-u', mount], stderr=subprocess.DEVNULL).returncode == 0:
            break
        time.sleep(0.1)
    else:
        subprocess.run(['fusermount3', '-uz', mount])
    os.rmdir(mount)


def plain(path):
    return Target('plain', path, [path])


class Work:
    """Mounts things in a folder that is removed afterwards."""

    def __init__(self, folder, xofs, passthrough):
        self.folder, self.xofs_program, self.passthrough_program = Path(folder), xofs, passthrough
        self.count = 0

    def new(self):
        self.count += 1
        mount = self.folder / str(self.count)
        mount.mkdir()
        return mount

    def xofs(self, name, source, *options, stem=None):
        """Mounts a repository, VHD or folder. `path` is the disk called `stem`, or the only one, or the mount."""
        mount = self.new()
        server = start([self.xofs_program, 'mount', *options, source, mount])

        def stop():
            end(server)
            detach(mount)

        try:
            wait_for(lambda: os.path.ismount(mount), name, server)
        except BaseException:
            stop()
            raise
        target = Target(name, mount, [source], [server.pid], stop)
        if stem is not False:
            files = [path for path in mount.rglob('*.raw') if stem in (None, path.stem)]
            if len({os.path.realpath(file) for file in files}) != 1:
                stop()
                sys.exit(f'bench: {source} mounted shows {len(files)} disks where one was expected')
            target.path = files[0]
        return target

    def qemu(self, vhd):
        point = self.folder / f'{self.new().name}.raw'
        point.touch()
        server = start(['qemu-storage-daemon', '--blockdev', f'driver=file,node-name=f,filename={vhd},read-only=on',
                        '--blockdev', 'driver=vpc,node-name=d,file=f,read-only=on',
                        '--export', f'type=fuse,id=e,node-name=d,mountpoint={point}'])
        try:
            wait_for(lambda: point.stat().st_size > 0, 'qemu-storage-daemon', server)
        except BaseException:
            end(server)
            raise
        return Target('qemu', point, [vhd], [server.pid], lambda: end(server))

    def nbdfuse(self, vhd):
        mount = self.new()
        # Told its pid before it starts qemu-nbd, whose pid is that of its child.
        server = start(['nbdfuse', '-r', mount / 'nbd.raw', '[', 'qemu-nbd', '--read-only', '--format=vpc', vhd, ']'])

        def stop():
            if os.path.ismount(mount):
                subprocess.run(['fusermount3', '-u', mount])
            end(server)
            detach(mount)

        try:
            wait_for(lambda: os.path.ismount(mount) and (mount / 'nbd.raw').stat().st_size > 0, 'nbdfuse', server)
        except BaseException:
            stop()
            raise
        return Target('nbdfuse', mount / 'nbd.raw', [vhd], [server.pid, *children(server.pid)], stop)

    def vhdimount(self, vhd):
        mount = self.new()
        try:
            subprocess.run(['vhdimount', vhd, mount], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
            wait_for(lambda: os.path.ismount(mount) and any(mount.iterdir()), 'vhdimount')
            # One file for each of the chain, the leaf last.
            leaf = max(mount.iterdir(), key=lambda path: int(path.name.removeprefix('vhdi')))
        except BaseException:
            detach(mount)
            raise
        return Target('vhdimount', leaf, [vhd.parent], serving(mount), lambda: detach(mount))

    def slow(self, source, delay_ms, operations=()):
        """A folder seen as over a network whose every operation, or only those named, takes so long."""
        mount = self.new()
        control = mount.with_suffix('.control')
        server = start([self.passthrough_program, source, mount, '--control', control, '--valid', '60000'],
                       stdout=subprocess.PIPE)

        def stop():
            end(server)
            detach(mount)

        if server.stdout.readline() != b'ready\n':
            stop()
            sys.exit('bench: passthrough did not mount')
        target = SlowPath('slow', mount, [source], [server.pid], stop)
        target.control = control
        target.ask(f'delay {delay_ms} * ops={",".join(operations)}')
        return target


def children(pid):
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def serving(mount):
    """The processes that name a mount point in their arguments; vhdimount does not say its own pid."""
    found = []
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(mount).encode() in (entry / 'cmdline').read_bytes().split(b'\0'):
                    found.append(int(entry.name))
            except OSError:
                pass  # It ended meanwhile.
    return found
