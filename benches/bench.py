"""Measures reading mounted backups and writing them, beside other ways to do the same. See docs/performance.md.

usage: bench.py PROGRAMS FOLDER [GROUP...] [--rounds N] [--seconds N] [--ingest GIB] [--pool GIB]
                [--json FILE]

PROGRAMS is the folder of the release binaries; FOLDER keeps the disks that are read.
"""
import argparse, hashlib, os, shutil, signal, subprocess, sys, tempfile, time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import big, disk, guest, pool, probes, reading, repository, writing
from reading import drop, use_memory, warm
from report import Report
from targets import Work, plain

MIB = 1 << 20
SIZES = [512, 4 << 10, 32 << 10, 128 << 10, MIB, 4 * MIB]
DELAY_MS = 5
WORKING_SET = 128 * MIB
WARM_RANDOM = 'Random 4 KiB, 1 reader, within 128 MiB in the cache'


def size_name(size):
    return f'{size} B' if size < 1024 else f'{size >> 10} KiB' if size < MIB else f'{size >> 20} MiB'


class Bench:
    def __init__(self, args, work):
        self.args, self.work, self.report = args, work, Report()
        self.disks, self.writing, self.guests, self.pools, self.probed = args.folder, None, None, None, None

    def add(self, group, test, unit, target, value, is_speed=True):
        self.report.add(group, test, unit, target, value, is_speed)

    def rounds(self, targets):
        """Each round's number and each target in turn, so that what else the machine does meets all of them."""
        for number in range(self.args.rounds):
            for target in targets:
                yield number, target

    # Groups

    def read(self):
        """a chain of 5 VHD files: sequential, random, cold, CPU"""
        with self.chain_targets() as targets:
            self.sequential_states(targets)
            for title, request, readers in [('Random 4 KiB, 1 reader', 4096, 1), ('Random 4 KiB, 4 readers', 4096, 4),
                                            ('Random 64 KiB, 4 readers', 64 << 10, 4)]:
                self.random('read', title, targets, request, readers)
            self.placed([target for target in targets if target.name in ('xofs', 'qemu')])

    def sequential_states(self, targets):
        for state in ('cold', 'first', 'again'):
            test, cpu = f'Sequential, 1 MiB, {state}', 'CPU of server and reader, sequential, 1 MiB, first'
            if state == 'first':
                for target in targets:
                    warm(*target.sources)
            ways = [(target.name, target, lambda: reading.usual(MIB)) for target in targets]
            ways += [(f'{target.name}, stranger', target, reading.stranger) for target in targets
                     if target.name == 'xofs']
            for _, (name, target, program) in self.rounds(ways):
                if state == 'cold':
                    drop(*target.sources)
                if state != 'again':
                    self.drop_mounted(target)
                before = target.cpu()
                found = reading.sequential(target.path, MIB, 2 * self.args.seconds, program())
                self.add('read', test, 'MB/s', name, found.megabytes)
                if state == 'first':
                    used = (target.cpu() - before + found.cpu) / found.bytes * (1 << 30)
                    self.add('read', cpu, 'seconds per GiB', name, used, is_speed=False)
            self.report.print_test('read', test)
        self.report.print_test('read', cpu)

    def random(self, group, test, targets, request, readers):
        for _, target in self.rounds(targets):
            self.drop_mounted(target)
            found = reading.at_random(target.path, request, readers, self.args.seconds)
            self.add(group, test, 'reads/s', target.name, found.rate)
        self.report.print_test(group, test)

    def placed(self, targets):
        """How much of a small read is waking the other side, by where both sides run."""
        test, cores = 'Random 4 KiB, 1 reader, on the core of its server and on another', sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            print(f'\n{test}: left out, there is one core')
            return
        ways = [(f'{target.name}, {where} core', target, core) for target in targets
                for where, core in [('same', cores[0]), ('another', cores[1])]]
        for _, (name, target, core) in self.rounds(ways):
            self.drop_mounted(target)
            target.bind(cores[:1])
            try:
                found = reading.at_random(target.path, 4096, 1, self.args.seconds, core=core)
            finally:
                target.bind(cores)
            self.add('read', test, 'reads/s', name, found.rate)
        self.report.print_test('read', test)

    def sizes(self):
        """the chain by request size, 512 B to 4 MiB"""
        with self.chain_targets() as targets:
            for target in targets:
                warm(*target.sources)
            targets = [target for target in targets if target.name != 'xofs, one']
            for request in SIZES:
                test = f'Sequential, {size_name(request)} requests'
                ways = [(target.name, target, lambda: reading.usual(request)) for target in targets]
                ours = next(target for target in targets if target.name == 'xofs')
                if request < reading.LARGE:
                    ways.append(('xofs, habit', ours, lambda: reading.habitual(ours.path, request)))
                for _, (name, target, program) in self.rounds(ways):
                    program = program()
                    self.drop_mounted(target)
                    found = reading.sequential(target.path, request, self.args.seconds / 2, program)
                    self.add('sizes', test, 'MB/s', name, found.megabytes)
                if request < reading.LARGE:
                    self.dd(test, request, targets)
                self.report.print_test('sizes', test)
            for request in SIZES:
                if request not in (4096, 32 << 10):
                    self.random('sizes', f'Random, {size_name(request)} requests', targets, request, 1)

    def dd(self, test, request, targets):
        """dd says its request size in its arguments."""
        for _, target in self.rounds([target for target in targets if target.name in ('plain', 'xofs')]):
            self.drop_mounted(target)
            start = time.perf_counter()
            self.run(['dd', f'if={target.path}', 'of=/dev/null', f'bs={request}', f'count={64 * MIB // request}'])
            rate = 64 * MIB / 1e6 / (time.perf_counter() - start)
            self.add('sizes', test, 'MB/s', f'{target.name}, dd', rate)

    def formats(self):
        """a disk of 512 MiB as exploded VHD: plain, gzip, brotli, encrypted"""
        folder = disk.make_formats(self.disks / 'formats')
        encrypted = repository.make_encrypted(self.disks / 'encrypted')
        sources = {name: folder / name / 'disk.vhd' for name in ('plain', 'gzip', 'brotli')}
        options = {'encrypted': ['--password-file', encrypted / 'key']}
        sources['encrypted'] = encrypted / 'repository'
        group, sequential = 'formats', 'Sequential, 1 MiB, first'
        cold_random, warm_random = 'Random 4 KiB, 1 reader, first', WARM_RANDOM
        limit, cpu = 'Decoding on all cores', 'CPU of server and reader, sequential, 1 MiB, first'
        with ExitStack() as stack:
            references = [plain(folder / 'plain.raw'), stack.enter_context(self.work.qemu(folder / 'one.vhd'))]

            def fresh(name):
                return self.work.xofs(name, sources[name], *options.get(name, ()), stem=None)

            truth = digest(references[0])
            check(truth, references[1:])
            for name in sources:
                warm(sources[name])
                with fresh(name) as target:
                    check(truth, [target])
            for _ in range(self.args.rounds):
                for reference in references:
                    self.drop_mounted(reference)
                    before = reference.cpu()
                    found = reading.sequential(reference.path)
                    used = (reference.cpu() - before + found.cpu) / found.bytes * (1 << 30)
                    self.add(group, sequential, 'MB/s', reference.name, found.megabytes)
                    self.add(group, cpu, 'seconds per GiB', reference.name, used, is_speed=False)
                    self.drop_mounted(reference)
                    for test, within in [(cold_random, None), (warm_random, WORKING_SET)]:
                        found = reading.at_random(reference.path, 4096, 1, self.args.seconds, within=within)
                        self.add(group, test, 'reads/s', reference.name, found.rate)
                for name in sources:
                    shown = f'xofs, {name}'
                    if name in ('gzip', 'brotli'):
                        said = subprocess.run([self.args.programs / 'examples' / 'decode', sources[name]], check=True,
                                              capture_output=True, text=True).stdout
                        self.add(group, limit, 'MB/s', shown, float(said))
                    with fresh(name) as target:
                        before = target.cpu()
                        found = reading.sequential(target.path)
                        used = (target.cpu() - before + found.cpu) / found.bytes * (1 << 30)
                        self.add(group, sequential, 'MB/s', shown, found.megabytes)
                        self.add(group, cpu, 'seconds per GiB', shown, used, is_speed=False)
                    with fresh(name) as target:
                        found = reading.at_random(target.path, 4096, 1, self.args.seconds)
                        self.add(group, cold_random, 'reads/s', shown, found.rate)
                    with fresh(name) as target:
                        for offset in range(0, WORKING_SET, disk.BLOCK):
                            with open(target.path, 'rb', buffering=0) as file:
                                os.pread(file.fileno(), 64 << 10, offset)
                        found = reading.at_random(target.path, 4096, 1, self.args.seconds, within=WORKING_SET)
                        self.add(group, warm_random, 'reads/s', shown, found.rate)
        for test in (sequential, limit, cold_random, warm_random, cpu):
            self.report.print_test(group, test)

    def tools(self):
        """what people do: cp, qemu-img convert, tar, a loop mount"""
        room = Path('/dev/shm')
        if not os.access(room, os.W_OK) or shutil.disk_usage(room).free < 2 * disk.CHAIN_SIZE:
            room = self.work.folder
        copy = room / f'xofs-bench-{os.getpid()}.raw'
        commands = {
            'cp': lambda path: ['cp', path, copy],
            'cp --sparse=always': lambda path: ['cp', '--sparse=always', path, copy],
            'qemu-img convert to nowhere': lambda path: [
                'qemu-img', 'convert', '-n', '-f', 'raw', '--target-image-opts', path,
                f'driver=null-co,size={disk.CHAIN_SIZE}'],
            # GNU tar does not read what it writes to /dev/null.
            'tar': lambda path: ['sh', '-c', 'tar -cf - -C "$1" "$2" | cat >/dev/null', 'sh', path.parent, path.name],
        }
        with self.chain_targets() as targets:
            for target in targets:
                warm(*target.sources)
            for test, command in commands.items():
                for number, target in self.rounds(targets):
                    # It takes a quarter of a minute each time, and is never near the others.
                    if target.name == 'vhdimount' and number > 0:
                        continue
                    self.drop_mounted(target)
                    try:
                        use_memory(copy, 2 * disk.CHAIN_SIZE)
                        seconds = self.time(command(target.path))
                    finally:
                        copy.unlink(missing_ok=True)
                    self.add('tools', test, 'MB/s', target.name, disk.CHAIN_SIZE / 1e6 / seconds)
                self.report.print_test('tools', test)
        self.loop()

    def loop(self):
        test = 'Loop mount: all files of an ext4 filesystem'
        if os.geteuid() != 0:
            print(f'\n{test}: left out, it needs root')
            return
        folder = disk.make_guest(self.disks / 'guest')
        with ExitStack() as stack:
            targets = [plain(folder / 'plain.raw'), stack.enter_context(self.work.xofs('xofs', folder / 'one')),
                       stack.enter_context(self.work.qemu(folder / 'one' / 'one.vhd')),
                       stack.enter_context(self.work.nbdfuse(folder / 'one' / 'one.vhd'))]
            check(digest(targets[0]), targets[1:])
            for _, target in self.rounds(targets):
                self.drop_mounted(target)
                mount = self.work.new()
                try:
                    self.run(['mount', '-o', 'ro,loop', target.path, mount])
                    seconds = self.time(['sh', '-c', 'tar -cf - -C "$1" . | cat >/dev/null', 'sh', mount])
                finally:
                    if os.path.ismount(mount):
                        self.run(['umount', mount])
                self.add('tools', test, 'seconds', target.name, seconds, is_speed=False)
            self.report.print_test('tools', test)

    def open(self):
        """opening by chain length"""
        folder = disk.make_lengths(self.disks / 'lengths')
        for state in ('cold', 'warm'):
            test = f'From nothing to the first byte, by chain length, {state}'
            for number in range(self.args.rounds):
                for length in disk.LENGTHS:
                    source, leaf = folder / str(length), folder / str(length) / f'{length - 1}.vhd'
                    ways = [('xofs', lambda: self.work.xofs('xofs', leaf)),
                            ('vhdimount', lambda: self.work.vhdimount(leaf))]
                    for name, way in ways:
                        # It reads no chain of 100.
                        if name == 'vhdimount' and length >= 100:
                            continue
                        (drop if state == 'cold' else warm)(source)
                        start = time.perf_counter()
                        with way() as target:
                            with open(target.path, 'rb', buffering=0) as file:
                                assert len(file.read(4096)) == 4096
                            seconds = time.perf_counter() - start
                        self.add('open', test, 'milliseconds', f'{name}, {length}', seconds * 1000, is_speed=False)
            self.report.print_test('open', test)

    def list(self):
        """listing 100 VMs with 20 backups each, with and without the listing cache"""
        folder = repository.make_listings(self.disks / 'listings')
        for state in ('cold', 'warm'):
            test = f'Listing 2000 backups, {state}'
            for number in range(self.args.rounds):
                for name in ('cached', 'uncached'):
                    source = folder / name
                    for what, mounted in [('xofs list', None), ('find of the VMs', 'vms'),
                                          ('find of the backups', 'backups')]:
                        (drop if state == 'cold' else warm)(source)
                        if mounted is None:
                            seconds = self.time([self.work.xofs_program, 'list', source])
                        else:
                            with self.work.xofs('xofs', source, stem=False) as target:
                                depth = ['-maxdepth', '1' if mounted == 'vms' else '2']
                                seconds = self.time(['find', target.path / 'vms', *depth])
                        self.add('list', test, 'milliseconds', f'{what}, {name}', seconds * 1000, is_speed=False)
            self.report.print_test('list', test)

    def memory(self):
        """peak memory of the servers"""
        formats = disk.make_formats(self.disks / 'formats')
        listing = repository.make_listings(self.disks / 'listings') / 'cached'
        lengths = disk.make_lengths(self.disks / 'lengths')
        chain = disk.make_chain(self.disks / 'read')
        one = chain / 'one' / 'one.vhd'
        leaf = chain / 'chain' / f'{disk.LAYERS - 1}.vhd'
        listed = lambda target: self.run(['find', target.path / 'vms', '-maxdepth', '3'])
        passed = lambda target: reading.sequential(target.path, MIB, 2)
        many = lambda target: reading.at_random(target.path, MIB, 4, 1)
        ways = [
            ('xofs, nothing read', lambda: self.work.xofs('xofs', one), lambda target: None),
            ('xofs, 2000 backups listed', lambda: self.work.xofs('xofs', listing, stem=False), listed),
            ('xofs, chain of 1000 opened', lambda: self.work.xofs('xofs', lengths / '1000' / '999.vhd'),
             lambda target: reading.at_random(target.path, 4096, 1, 0.1)),
            ('xofs, chain of 5, sequential', lambda: self.work.xofs('xofs', leaf), passed),
            ('xofs, chain of 5, random, 4 readers', lambda: self.work.xofs('xofs', leaf), many),
            ('xofs, brotli, sequential', lambda: self.work.xofs('xofs', formats / 'brotli' / 'disk.vhd'), passed),
            ('xofs, brotli, random, 4 readers', lambda: self.work.xofs('xofs', formats / 'brotli' / 'disk.vhd'), many),
            ('qemu, one VHD, sequential', lambda: self.work.qemu(one), passed),
            ('nbdfuse, one VHD, sequential', lambda: self.work.nbdfuse(one), passed),
            ('vhdimount, chain of 5, sequential', lambda: self.work.vhdimount(leaf), passed),
        ]
        for name, way, act in ways:
            with way() as target:
                act(target)
                self.add('memory', 'Peak memory', 'MiB', name, target.peak(), is_speed=False)
        self.report.print_test('memory', 'Peak memory')

    def slow(self):
        """a path with 5 ms per operation"""
        folder = disk.make_formats(self.disks / 'formats')
        tests = {name: f'Sequential, 1 MiB, {DELAY_MS} ms per operation, exploded {name}'
                 for name in ('plain', 'brotli')}
        seconds = 5 * self.args.seconds
        truth = digest(plain(folder / 'plain.raw'))
        for name, test in tests.items():
            for number in range(self.args.rounds):
                for shown, options in [('xofs', []), ('one at a time', ['--cache', '0'])]:
                    with self.work.slow(folder / name, DELAY_MS) as path, \
                            self.work.xofs(shown, path.path / 'disk.vhd', *options) as target:
                        if number == 0 and shown == 'xofs':
                            check(truth, [target])
                    with self.work.slow(folder / name, DELAY_MS) as path, \
                            self.work.xofs(shown, path.path / 'disk.vhd', *options) as target:
                        found = reading.sequential(target.path, MIB, seconds)
                        self.add('slow', test, 'MB/s', shown, found.megabytes)
            self.report.print_test('slow', test)

    def big(self):
        """big repositories: 500 VMs, 50,000 backups, 16 TiB, long chains, each against its goal"""
        big.main([str(self.args.programs / 'xofs'), str(self.args.programs / 'passthrough'), str(self.disks / 'big'),
                  '--rounds', str(self.args.rounds)])

    def write(self):
        """merging by rename, merging VHD files, ingest, beside their limits and Xen Orchestra"""
        self.writing = writing.Writing(self)
        self.writing.run()

    def guest(self):
        """files inside a guest's disk, beside the kernel's loop mount"""
        self.guests = guest.Guest(self)
        self.guests.run()

    def pool(self):
        """backups of a simulated pool, near and far, beside nbdcopy, and the ways to read a disk"""
        self.pools = pool.Pools(self)
        self.pools.run()

    def probes(self):
        """what counting where the time goes costs"""
        self.probed = probes.Probes(self, writing.Writing(self))
        self.probed.run()

    # What they share

    @contextmanager
    def chain_targets(self):
        """All ways to read the chain or the single VHD of its content, checked to give the same bytes."""
        folder = disk.make_chain(self.disks / 'read')
        one, leaf = folder / 'one' / 'one.vhd', folder / 'chain' / f'{disk.LAYERS - 1}.vhd'
        with ExitStack() as stack:
            targets = [plain(folder / 'plain.raw')]
            for way in [lambda: self.work.xofs('xofs', folder / 'chain', stem=leaf.stem),
                        lambda: self.work.xofs('xofs, one', one), lambda: self.work.qemu(one),
                        lambda: self.work.nbdfuse(one), lambda: self.work.vhdimount(leaf)]:
                targets.append(stack.enter_context(way()))
            check(digest(targets[0]), targets[1:])
            yield targets

    @staticmethod
    def drop_mounted(target):
        """Of the plain file the page cache is what all are compared with: it stays."""
        if target.name != 'plain':
            drop(target.path)

    @staticmethod
    def run(command):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def time(self, command):
        start = time.perf_counter()
        self.run(command)
        return time.perf_counter() - start

    def goals(self):
        """What was set out to be reached with default settings: (what, least, measured)."""
        ratio, median = self.report.ratio, self.report.median
        goals = [('Sequential, 1 MiB, of qemu', 5, ratio('read', 'Sequential, 1 MiB, first', 'xofs', 'qemu'))]
        for title, least in [('Random 4 KiB, 1 reader', 2.4), ('Random 4 KiB, 4 readers', 2.4),
                             ('Random 64 KiB, 4 readers', 2.7)]:
            goals.append((f'{title}, of qemu', least, ratio('read', title, 'xofs', 'qemu')))
        goals += [
            ('qemu-img convert, of qemu', 2.5, ratio('tools', 'qemu-img convert to nowhere', 'xofs', 'qemu')),
            ('cp, of qemu', 1.8, ratio('tools', 'cp', 'xofs', 'qemu')),
        ]
        for request in (512, 4096):
            test = f'Sequential, {size_name(request)} requests'
            goals += [(f'{test}, {who}, of the kernel\'s cache', 0.5, ratio('sizes', test, name, 'xofs, habit'))
                      for who, name in [('a program\'s first disk', 'xofs'), ('dd', 'xofs, dd')]]
        for name in ('gzip', 'brotli'):
            shown = f'xofs, {name}'
            goals.append((f'Exploded {name}, sequential, of decoding on all cores', 0.8,
                          ratio('formats', 'Sequential, 1 MiB, first', shown, shown, 'Decoding on all cores')))
            rate = median('formats', WARM_RANDOM, shown)
            times = ratio('formats', WARM_RANDOM, shown, shown, 'Random 4 KiB, 1 reader, first')
            if rate is not None and (rate >= 50_000 or times < 50):
                goals.append((f'Exploded {name}, random 4 KiB in the cache, reads/s', 50_000, rate))
            else:
                goals.append((f'Exploded {name}, random 4 KiB in the cache, of the first time', 50, times))
        slow = f'Sequential, 1 MiB, {DELAY_MS} ms per operation, exploded plain'
        goals.append((f'{DELAY_MS} ms per operation, exploded plain, of one at a time', 8,
                      ratio('slow', slow, 'xofs', 'one at a time')))
        return goals + [goal for part in (self.writing, self.guests, self.pools, self.probed) if part for goal in part.goals()]


def digest(target):
    with open(target.path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def check(truth, targets):
    wrong = [target.name for target in targets if digest(target) != truth]
    if wrong:
        sys.exit(f'bench: {", ".join(wrong)} reads other bytes than the plain file: nothing to compare')


GROUPS = ['read', 'sizes', 'formats', 'tools', 'open', 'list', 'memory', 'slow', 'big', 'write', 'guest', 'pool', 'probes']


def interrupted(*_):
    # Once: what follows is cleaning up, which a second Ctrl-C must not cut short.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(130)


def main():
    help_of_groups = '\n'.join(f'  {name:9}{getattr(Bench, name).__doc__}' for name in GROUPS)
    parser = argparse.ArgumentParser(description=f'{__doc__}\ngroups, all if none is named:\n{help_of_groups}',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('programs', type=Path)
    parser.add_argument('folder', type=Path)
    parser.add_argument('groups', nargs='*', metavar='group')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=1, help='of each random measurement (default: 1)')
    parser.add_argument('--ingest', type=int, default=1, metavar='GIB', help='size of the image of `write` (default: 1)')
    parser.add_argument('--pool', type=int, default=3, metavar='GIB', help='size of the disk of `pool` (default: 3)')
    parser.add_argument('--json', type=Path, help='also write all figures to this file')
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        parser.error(f'no group is called {unknown[0]}')
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='work-', dir=args.folder) as folder:
        bench = Bench(args, Work(folder, args.programs / 'xofs', args.programs / 'passthrough'))
        for group in args.groups or GROUPS:
            print(f'\n## {group}: {getattr(Bench, group).__doc__}', flush=True)
            start = time.monotonic()
            getattr(bench, group)()
            print(f'\n{time.monotonic() - start:.0f} s', flush=True)
    bench.report.print_goals(bench.goals())
    if args.json:
        bench.report.write(args.json)


if __name__ == '__main__':
    main()
