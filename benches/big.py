#!/usr/bin/env python3
"""Measures big repositories: until a mount is ready, listings, memory, huge disks, long chains, a walk over everything.

usage: big.py XOFS PASSTHROUGH FOLDER [--only NAME,...] [--rounds N]

The repositories are made up (big_repository.py) and kept in FOLDER. Where a storage is to be slow, the repository is seen
through a mount of `passthrough` that delays every request of the kernel; the kernel keeps names and attributes of it for a
minute, as a client of NFS does ("kept"), or not at all. The files under it are in the page cache. Needs the right to mount.

Prints one table: each figure, as the median of the rounds, beside its goal.
"""
import argparse, os, re, statistics, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

import big_repository as repository
from targets import start

MIB = 1 << 20
TIB = 1 << 40


def peak(pid):
    """The most memory a process ever had, in MiB."""
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path(f'/proc/{pid}/status').read_text())[1]) / 1024


def open_files(pid):
    return len(os.listdir(f'/proc/{pid}/fd'))


class Bench:
    def __init__(self, xofs, passthrough, folder, rounds):
        self.xofs, self.passthrough, self.folder, self.rounds = xofs.resolve(), passthrough.resolve(), folder, rounds
        self.rows = []

    def row(self, what, figures, unit, goal=None):
        median = statistics.median(figures)
        kept = '' if goal is None else 'yes' if median <= goal else 'NO'
        self.rows.append((what, f'{median:,.3g} {unit}' if median < 100 else f'{median:,.0f} {unit}',
                          '' if goal is None else f'≤ {goal:g} {unit}', kept))
        print(f'{what}: {self.rows[-1][1]} {self.rows[-1][2]} {kept}', file=sys.stderr)

    def table(self):
        busy = os.getloadavg()[0]
        print(f'\nMedians of {self.rounds}, {os.cpu_count()} cores, load {busy:.1f}\n')
        print('| figure | measured | goal | kept |\n|---|---:|---:|---|')
        for row in self.rows:
            print(f'| {" | ".join(row)} |')

    @contextmanager
    def slow(self, source, delay, valid=60000):
        """The folder, seen through a mount that delays each request by so many milliseconds; 0: itself."""
        if not delay:
            yield source
            return
        with tempfile.TemporaryDirectory(prefix='slow-', dir=self.folder) as mount:
            server = subprocess.Popen([self.passthrough, source, mount, '--delay', str(delay), '--valid', str(valid)],
                                      stdout=subprocess.PIPE)
            try:
                if server.stdout.readline() != b'ready\n':
                    sys.exit('bench: passthrough did not mount')
                yield Path(mount)
            finally:
                server.terminate()
                server.wait(20)
                server.stdout.close()

    @contextmanager
    def mounted(self, source, *arguments):
        """Mounts and yields the mount point, the process, and the seconds until its VMs were listed."""
        with tempfile.TemporaryDirectory(prefix='mount-', dir=self.folder) as mount:
            begun = time.perf_counter()
            server = start([self.xofs, 'mount', source, mount, *arguments])
            try:
                while not os.path.ismount(mount):
                    if server.poll() is not None:
                        sys.exit(f'bench: xofs mount ended with {server.returncode}')
                    time.sleep(0.001)
                os.listdir(Path(mount) / 'vms') if (source / 'xo-vm-backups').exists() else os.listdir(mount)
                yield Path(mount), server, time.perf_counter() - begun
            finally:
                if server.poll() is None:
                    subprocess.run([self.xofs, 'unmount', mount], check=True)
                    server.wait(20)

    def timed(self, *command):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    # What is measured, one function for each group.

    def ready(self):
        source = repository.make(self.folder / 'ready', 500, 20)
        for valid, said in [(60000, 'names kept'), (0, 'names not kept')]:
            times = []
            for _ in range(self.rounds):
                with self.slow(source, 1, valid) as slow, self.mounted(slow) as (_, _, seconds):
                    times.append(seconds)
            self.row(f'500 VMs × 20 backups, 1 ms per request, {said}: ready', times, 's', 3)

    def listing(self):
        cached = repository.make(self.folder / 'listing-cached', 22, 45, caches=True)
        plain = repository.make(self.folder / 'listing', 22, 45)
        for source, delay, said, goal in [
                (cached, 0, 'with caches, local disk', 0.05), (plain, 0, 'without caches, local disk', 0.3),
                (plain, 10, 'without caches, 10 ms per request', 1), (cached, 10, 'with caches, 10 ms per request', None)]:
            programs, mounts, singles = [], [], []
            for _ in range(self.rounds):
                with self.slow(source, delay) as slow:
                    programs.append(self.timed(self.xofs, 'list', slow))
                with self.slow(source, delay) as slow, self.mounted(slow) as (mount, _, _):
                    start = time.perf_counter()
                    days = os.listdir(mount / 'by-date')
                    mounts.append(time.perf_counter() - start)
                    assert len(days) == 45, days
                with self.slow(source, delay) as slow, self.mounted(slow) as (mount, _, _):
                    start = time.perf_counter()
                    assert len(os.listdir(min((mount / 'vms').iterdir()))) == 46
                    singles.append(time.perf_counter() - start)
            self.row(f'22 VMs × 45 backups, {said}: listed in the mount', mounts, 's', goal)
            self.row(f'22 VMs × 45 backups, {said}: `xofs list`, all of the program', programs, 's')
            self.row(f'one VM of them, {said}: `ls`', singles, 's')

    def memory(self):
        for caches in [False, True]:
            source = repository.make(self.folder / f'memory-{caches}', 500, 100, caches=caches)
            said = 'with caches' if caches else 'without caches'
            with self.mounted(source) as (mount, server, _):
                start = time.perf_counter()
                os.listdir(mount / 'by-date')
                self.row(f'50,000 backups, {said}: listed in', [time.perf_counter() - start], 's')
                self.row(f'50,000 backups, {said}: peak memory', [peak(server.pid)], 'MiB', 190.7)
                if not caches:
                    found = subprocess.run(['find', mount, '-path', '*/disks', '-prune'], check=True, capture_output=True)
                    self.row('the same, after find went over it', [peak(server.pid)], 'MiB')
                    assert not found.stderr, found.stderr

    def huge(self):
        source = repository.make_disks(self.folder / 'huge', 1, 16 * TIB, 100_000)
        times, peaks = [], []
        for _ in range(self.rounds):
            with self.mounted(source) as (mount, server, _):
                name, = mount.glob('*.raw')
                start = time.perf_counter()
                with open(name, 'rb') as disk:
                    assert os.fstat(disk.fileno()).st_size == 16 * TIB
                    times.append(time.perf_counter() - start)
                peaks.append(peak(server.pid))
        self.row('an exploded disk of 16 TiB: opened', times, 's', 1)
        self.row('an exploded disk of 16 TiB: peak memory of the whole process', peaks, 'MiB', 64)

    def chain(self):
        source = repository.make_disks(self.folder / 'chain', 64, 2 * TIB, 2000)
        for delay, valid in [(0, 0), (1, 60000), (10, 60000)]:
            ratios, opens = [], []
            for _ in range(self.rounds):
                with self.slow(source, delay, valid) as slow:
                    maps = self.read_maps(slow)
                with self.slow(source, delay, valid) as slow, self.mounted(slow) as (mount, _, _):
                    leaf = max(mount.glob('*.raw'))
                    start = time.perf_counter()
                    with open(leaf, 'rb'):
                        opens.append(time.perf_counter() - start)
                ratios.append(opens[-1] / maps)
            said = f'{delay} ms per request' if delay else 'local disk'
            self.row(f'a chain of 64 exploded disks of 2 TiB, {said}: opened', opens, 's')
            self.row(f'a chain of 64 exploded disks of 2 TiB, {said}: of reading its maps one after the other', ratios,
                     '×', 2)

    @staticmethod
    def read_maps(folder):
        start = time.perf_counter()
        for table in sorted(folder.glob('data/*/bat')):
            table.read_bytes()
        return time.perf_counter() - start

    def walk(self):
        source = repository.make(self.folder / 'walk', 100, 10, chains=2, size=200 << 30)
        for command in [['find', '.', '-size', '+1k'], ['du', '-s', '.'], ['find', '.', '-name', '*.raw', '-newer', '.']]:
            with self.mounted(source) as (mount, server, _):
                start = time.perf_counter()
                subprocess.run(command, cwd=mount, check=True, stdout=subprocess.DEVNULL)
                seconds = time.perf_counter() - start
                said = f'`{" ".join(command)}` over 2,000 disks of 200 GiB'
                self.row(f'{said}', [seconds], 's')
                self.row(f'{said}: peak memory', [peak(server.pid)], 'MiB', 256)
                self.row(f'{said}: open files', [open_files(server.pid)], 'files')


GROUPS = ['ready', 'listing', 'memory', 'huge', 'chain', 'walk']


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('xofs', type=Path)
    parser.add_argument('passthrough', type=Path)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--only', default=','.join(GROUPS))
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.xofs, args.passthrough, args.folder.resolve(), args.rounds)
    for name in args.only.split(','):
        if name not in GROUPS:
            parser.error(f'no group {name}: there are {", ".join(GROUPS)}')
        getattr(bench, name)()
    bench.table()


if __name__ == '__main__':
    main()
