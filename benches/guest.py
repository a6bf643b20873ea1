"""Files inside a guest's disk: through xofs, and through the kernel's loop mount of the same raw disk.

The disk is an ext4 with 100,000 files in 1,000 folders, 10,000 files of a few KiB, and a large one; the backup is a plain VHD.
"""
import os, subprocess, time
from contextlib import contextmanager
from pathlib import Path

import disk, reading

SIZE = 3 << 30
FOLDERS, IN_EACH = 1000, 100
SMALL = 10_000
LARGE = 1 << 30
VM = '5d1f0c1e-6a0c-4a4e-9d5a-3c1b1f6f7a10'
FOUND = FOLDERS * (IN_EACH + 1) + 1

GROUP = 'guest'
FIRST = 'From nothing to the first directory, cold'
FIND = 'find of 100,000 files with their sizes'
TAR = 'tar of 10,000 small files'
SEQUENTIAL = 'Large file, 1 MiB, first'
WHOLE = 'xofs, the whole disk'
COUNTED = [f'Reads of the storage: {act}' for act in ('first directory', 'find', 'small files', 'large file of 1 GiB')]


def find(files):
    return ['find', files / 'many', '-size', '+9', '-printf', '%s']


def tar(files):
    # GNU tar does not read what it writes to /dev/null.
    return ['sh', '-c', 'tar -cf - -C "$1" . | cat >/dev/null', 'sh', files / 'small']


def make_guest_disk(folder, program):
    """plain.raw, and repository: the same as a backup."""
    @disk.once
    def make_files(folder):
        raw, mount = folder / 'plain.raw', folder / 'mount'
        with open(raw, 'wb') as file:
            file.truncate(SIZE)
        subprocess.run(['mkfs.ext4', '-q', '-F', '-N', '200000', '-U', str(disk.identifier('files')), raw], check=True)
        mount.mkdir()
        subprocess.run(['mount', '-o', 'loop', raw, mount], check=True)
        try:
            fill(mount)
        finally:
            subprocess.run(['umount', mount], check=True)
            mount.rmdir()
        subprocess.run([program, 'repository', 'init', folder / 'repository'], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([program, 'ingest', '--repository', folder / 'repository', '--vm', VM, '--name', 'files',
                        '--disk', f'xvda={raw}', '--format', 'vhd'], check=True, stdout=subprocess.DEVNULL)

    return make_files(folder)


def fill(mount):
    for number in range(FOLDERS):
        folder = mount / 'many' / str(number)
        folder.mkdir(parents=True)
        for name in range(IN_EACH):
            (folder / f'file {name}').touch()
    (mount / 'small').mkdir()
    data = os.urandom(16 << 10)
    for number in range(SMALL):
        (mount / 'small' / str(number)).write_bytes(data[:2048 + number % 12_000])
    with open(mount / 'large', 'wb') as file:
        for _ in range(LARGE >> 20):
            file.write(os.urandom(1 << 20))


class Guest:
    def __init__(self, bench):
        self.bench, self.work = bench, bench.work

    def run(self):
        if os.geteuid() != 0:
            print('\nFiles in a guest: left out, the loop mount that it is compared with needs root')
            return
        folder = make_guest_disk(self.bench.disks / 'files', self.work.xofs_program)
        raw = folder / 'plain.raw'
        ways = {'plain': lambda source=raw: self.kernel(source),
                'xofs': lambda source=folder / 'repository': self.xofs(source)}
        tests = {}
        for _ in range(self.bench.args.rounds):
            for name, way in ways.items():
                reading.drop(raw, folder / 'repository')
                for test, unit, value, is_speed in self.measure(name, way, [raw, folder / 'repository']):
                    self.bench.add(GROUP, test, unit, name, value, is_speed)
                    tests[test] = None
        for name, way in ways.items():
            self.count(name, way, raw if name == 'plain' else folder / 'repository')
        for test in [*tests, *COUNTED]:
            self.bench.report.print_test(GROUP, test)

    def measure(self, name, way, sources):
        """(test, unit, value, whether more is better) of one mount."""
        start = time.perf_counter()
        with way() as (files, whole_disk):
            assert {'many', 'small', 'large'} <= set(os.listdir(files))
            yield FIRST, 'milliseconds', (time.perf_counter() - start) * 1000, False
            for state in ('first', 'again'):
                yield f'{FIND}, {state}', 'files/s', FOUND / self.time(find(files)), True
            yield TAR, 'files/s', SMALL / self.time(tar(files)), True
            # Of both the storage is in memory, and what is measured is the way from there.
            reading.warm(*sources)
            yield SEQUENTIAL, 'MB/s', reading.sequential(files / 'large', 1 << 20).megabytes, True
            if name == 'xofs':
                self.bench.add(GROUP, SEQUENTIAL, 'MB/s', WHOLE, reading.sequential(whole_disk, 1 << 20).megabytes)

    def count(self, name, way, source):
        """How many reads each act asks of what holds the backup, or the raw disk."""
        with self.work.slow(source.parent, 0) as path, way(path.path / source.name) as (files, _):
            acts = [lambda: os.listdir(files), lambda: self.time(find(files)), lambda: self.time(tar(files)),
                    lambda: reading.sequential(files / 'large', 1 << 20)]
            for test, act in zip(COUNTED, acts):
                act()
                self.bench.add(GROUP, test, 'reads', name, int(path.ask('count read')), is_speed=False)
                path.ask('reset')

    @contextmanager
    def kernel(self, raw):
        mount = self.work.new()
        subprocess.run(['mount', '-o', 'ro,loop,noload', raw, mount], check=True)
        try:
            yield mount, raw
        finally:
            subprocess.run(['umount', mount], check=True)
            mount.rmdir()

    @contextmanager
    def xofs(self, repository):
        with self.work.xofs('xofs', repository, stem=False) as target:
            backup = target.path / 'by-uuid' / VM / 'latest'
            yield backup / 'files' / 'xvda', backup / 'disks' / 'xvda.raw'

    @staticmethod
    def time(command):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    def goals(self):
        ratio, median = self.bench.report.ratio, self.bench.report.median
        first, found = median(GROUP, FIRST, 'xofs'), f'{FIND}, again'
        return [('First directory of a cold disk, of 300 ms', 1, first and 300 / first),
                (f'{found}, files/s', 20_000, median(GROUP, found, 'xofs')),
                ('Large file, of the whole disk', 0.6, ratio(GROUP, SEQUENTIAL, 'xofs', WHOLE))]
