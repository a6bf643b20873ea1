"""Measures the write side: merging by rename, merging VHD files, and ingest, each beside its limit and its goal.

Everything lies in one folder on the disk that is measured. Before each figure what was made for it is synced, so that no figure
pays for another.
"""
import concurrent.futures, fcntl, json, mmap, os, shutil, subprocess, time
from contextlib import contextmanager
from pathlib import Path

import disk
from reading import use_memory, warm
from targets import Target

MIB = 1 << 20
BLOCKS = 20_000
# Of these figures each block costs the same, and twenty thousand would take minutes.
SLOW_BLOCKS = 2_000
SLOW_MS = 1
FILE_BLOCKS = 256
SLOW_FILE_BLOCKS = 128
METADATA_MS = 10
# Bytes of a block in a VHD file: its sector bitmap and its data.
FULL_BLOCK = disk.SECTOR + disk.BLOCK
# All that passthrough knows but read, write, copy_file_range, lseek and fallocate: what a file server is asked besides content.
METADATA = ('create', 'flush', 'fsync', 'fsyncdir', 'getattr', 'link', 'lookup', 'mkdir', 'mknod', 'open', 'opendir', 'readdir',
            'readlink', 'rename', 'setattr', 'statfs', 'symlink', 'unlink')
FORMATS = ('none', 'gzip', 'brotli')
WRITERS = 4
RENAMERS = 16
VM = '1f2e3d4c-5b6a-4798-8a9b-0c1d2e3f4a5b'
XO_MERGE = Path(__file__).parent.parent / 'tests/interop/merge.mjs'

RENAMED = f'Merge of {BLOCKS:,} blocks by rename'
RENAMED_SLOW = f'Merge of {SLOW_BLOCKS:,} blocks by rename, {SLOW_MS} ms per operation'
COPIED = f'Merge of VHD files, {FILE_BLOCKS * disk.BLOCK // MIB} MiB'
COPIED_SLOW = f'Merge of VHD files, {SLOW_FILE_BLOCKS * disk.BLOCK // MIB} MiB, {METADATA_MS} ms per metadata operation'
OPENS = 'Files opened by a merge of VHD files'
ENCODING, WRITING, DIRECT = 'encoding on all cores', 'writing as many files', 'the same, O_DIRECT'
BARE = 'reading, hashing, encoding, writing, each core by itself'
GRAIN = 4096
PEAK = 'Peak memory of ingest'


def ingest_test(name):
    return f'Ingest, exploded {name}'


def sync(folder):
    subprocess.run(['sync', '-f', folder], check=True)


class Writing:
    def __init__(self, bench):
        self.bench, self.work, self.examples = bench, bench.work, bench.args.programs / 'examples'

    def run(self):
        self.merge_by_rename()
        self.merge_by_rename_slowly()
        self.merge_files()
        self.merge_files_slowly()
        self.count_opens()
        self.ingest()

    def add(self, test, unit, target, value, is_speed=True):
        self.bench.add('write', test, unit, target, value, is_speed)

    def measure(self, test, unit, amount, ways, make, slowly=None):
        """Has each way of `ways`, which gives the seconds it took in a folder made by `make`, take its turn in each round."""
        for _, (name, way) in self.bench.rounds(ways):
            with self.pair(*make) as folder:
                if slowly is None:
                    seconds = way(folder)
                else:
                    with self.work.slow(folder, *slowly) as slow:
                        seconds = way(slow.path)
            self.add(test, unit, name, amount / seconds)
        self.bench.report.print_test('write', test)

    @contextmanager
    def pair(self, layout, blocks):
        """A folder with two images of so many blocks, the second one built on the first."""
        folder = self.work.new()
        try:
            subprocess.run([self.examples / 'merge', 'make', folder, layout, str(blocks)], check=True)
            yield folder
        finally:
            shutil.rmtree(folder)
            sync(folder.parent)

    # Merging

    def merge(self, folder):
        return float(subprocess.check_output([self.examples / 'merge', 'run', folder]))

    @staticmethod
    def xo_merge(folder):
        names = sorted(path.name for path in folder.glob('*.vhd'))
        return float(subprocess.check_output(['node', XO_MERGE, folder, *names]))

    def merge_by_rename(self):
        with self.pair('exploded', 1000) as folder:
            syncs = int(subprocess.check_output([self.examples / 'merge', 'count', folder]))
        ways = [('xofs', self.merge), (f'rename(2), {syncs} fsync(2)', lambda folder: rename_all(folder, syncs)),
                ('Xen Orchestra', self.xo_merge)]
        self.rename_limit = ways[1][0]
        self.measure(RENAMED, 'blocks/s', BLOCKS, ways, ('exploded', BLOCKS))

    def merge_by_rename_slowly(self):
        ways = [('xofs', self.merge), (f'rename(2), {RENAMERS} threads', rename_at_once), ('Xen Orchestra', self.xo_merge)]
        self.measure(RENAMED_SLOW, 'blocks/s', SLOW_BLOCKS, ways, ('exploded', SLOW_BLOCKS), [SLOW_MS])

    def merge_files(self):
        ways = [('xofs', self.merge), ('copy_file_range(2)', copy_all), ('Xen Orchestra', self.xo_merge)]
        self.measure(COPIED, 'MB/s', FILE_BLOCKS * FULL_BLOCK / 1e6, ways, ('file', FILE_BLOCKS))

    def merge_files_slowly(self):
        ways = [('xofs', self.merge), ('open, read, write, close', copy_each)]
        self.measure(COPIED_SLOW, 'MB/s', SLOW_FILE_BLOCKS * FULL_BLOCK / 1e6, ways, ('file', SLOW_FILE_BLOCKS),
                     [METADATA_MS, METADATA])

    def count_opens(self):
        """As a file server sees them; what was opened is closed as often."""
        for blocks in (4, SLOW_FILE_BLOCKS):
            with self.pair('file', blocks) as folder, self.work.slow(folder, 0) as slow:
                self.merge(slow.path)
                self.add(OPENS, 'opens', f'{blocks} blocks', int(slow.ask('count open')), is_speed=False)
        self.bench.report.print_test('write', OPENS)

    # Ingest

    def ingest(self):
        size = self.bench.args.ingest
        image = disk.make_image(self.bench.disks / 'images' / str(size)) / 'image.raw'
        warm(image)
        said = {}
        for _, name in self.bench.rounds(FORMATS):
            test, megabytes = ingest_test(name), image.stat().st_size / 1e6
            repository = self.work.new()
            (repository / 'xo-vm-backups').mkdir()
            sync(repository)
            try:
                self.use_memory(size)
                start = time.perf_counter()
                found, peak = watched([self.work.xofs_program, 'ingest', repository, '--vm', VM, '--name', 'bench', '--disk',
                                       f'xvda={image}', '--compression', name, '--full', '--json'])
                self.add(test, 'MB/s', 'xofs', megabytes / (time.perf_counter() - start))
                self.add(PEAK, 'MiB', name, peak, is_speed=False)
                said.setdefault(name, []).append(json.loads(found)['transfer']['bottleneck']['stage'] or 'none')
                sizes = [path.stat().st_size for path in repository.glob('**/blocks/*/*')]
            finally:
                shutil.rmtree(repository)
                sync(self.work.folder)
            if name == 'none':
                self.add(test, 'MB/s', 'cp, sync', megabytes / self.copy_image(image))
            limit = float(subprocess.check_output([self.examples / 'encode', name, image]))
            self.add(test, 'MB/s', ENCODING, limit)
            self.add(test, 'MB/s', BARE, self.copy_by_cores(name, image))
            for target, flags in ((WRITING, 0), (DIRECT, os.O_DIRECT)):
                self.add(test, 'MB/s', target, megabytes / self.write_files(sizes, flags))
        for name in FORMATS:
            self.bench.report.print_test('write', ingest_test(name))
            print(f'\nbottleneck, as `--json` says: {", ".join(said[name])}', flush=True)
        self.bench.report.print_test('write', PEAK)

    def copy_image(self, image):
        copy = self.work.new() / 'image.raw'
        try:
            self.use_memory(self.bench.args.ingest)
            start = time.perf_counter()
            subprocess.run(['cp', '--reflink=never', image, copy], check=True)
            sync(copy)
            return time.perf_counter() - start
        finally:
            copy.unlink(missing_ok=True)
            sync(self.work.folder)

    def copy_by_cores(self, name, image):
        folder = self.work.new()
        try:
            self.use_memory(self.bench.args.ingest)
            return float(subprocess.check_output([self.examples / 'encode', name, image, folder]))
        finally:
            shutil.rmtree(folder)
            sync(self.work.folder)

    def write_files(self, sizes, flags):
        """Returns the seconds it takes to write files of these sizes, and to sync them; past the page cache all but their ends."""
        folder = self.work.new()
        data = mmap.mmap(-1, max(sizes))
        data.write(os.urandom(max(sizes)))

        def write(number):
            whole = sizes[number] - sizes[number] % GRAIN if flags else 0
            file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags)
            try:
                with memoryview(data) as view:
                    assert whole == 0 or os.pwrite(file, view[:whole], 0) == whole
                    fcntl.fcntl(file, fcntl.F_SETFL, 0)
                    assert os.pwrite(file, view[whole:sizes[number]], whole) == sizes[number] - whole
            finally:
                os.close(file)

        try:
            self.use_memory(self.bench.args.ingest)
            start = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(WRITERS) as pool:
                list(pool.map(write, range(len(sizes))))
            sync(folder)
            return time.perf_counter() - start
        finally:
            data.close()
            shutil.rmtree(folder)
            sync(self.work.folder)

    @staticmethod
    def use_memory(gibibytes):
        """Also those that are written take the memory that a virtual machine may have given away."""
        room = Path('/dev/shm')
        size = min(gibibytes + 1 << 30, shutil.disk_usage(room).free // 2)
        use_memory(room / f'xofs-bench-{os.getpid()}.memory', size)

    # Goals

    def goals(self):
        report = self.bench.report
        ratio = lambda test, base: report.ratio('write', test, 'xofs', base)
        goals = [
            ('Merge by rename, of rename(2) and as many syncs', 0.7, ratio(RENAMED, self.rename_limit)),
            ('Merge by rename, of Xen Orchestra', 1, ratio(RENAMED, 'Xen Orchestra')),
            (f'Merge by rename, {SLOW_MS} ms per operation, of Xen Orchestra', 10, ratio(RENAMED_SLOW, 'Xen Orchestra')),
            ('Merge of VHD files, of copy_file_range(2)', 0.7, ratio(COPIED, 'copy_file_range(2)')),
            (f'Merge of VHD files, {METADATA_MS} ms per metadata operation, of opening them for each block', 10,
             ratio(COPIED_SLOW, 'open, read, write, close')),
            (f'Files opened to merge 4 blocks, of those to merge {SLOW_FILE_BLOCKS}', 1,
             report.ratio('write', OPENS, '4 blocks', f'{SLOW_FILE_BLOCKS} blocks')),
        ]
        for name in FORMATS:
            test = ingest_test(name)
            median = lambda limit: report.median('write', test, limit)
            limit = min(ENCODING, max(WRITING, DIRECT, key=median), BARE, key=median)
            goals.append((f'{test}, of {limit}', 0.8, ratio(test, limit)))
        return goals


def block_names(folder, count):
    """The names of the blocks of the child, and what they are to be called in the base."""
    for block in range(count):
        yield tuple(f'{folder}/data/{image}.vhd/blocks/{block // 1000}/{block % 1000}' for image in (2, 1))


def rename_at_once(folder):
    """Only the renames of a merge, nothing synced."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(RENAMERS) as pool:
        list(pool.map(lambda names: os.rename(*names), block_names(folder, SLOW_BLOCKS)))
    return time.perf_counter() - start


def rename_all(folder, syncs):
    """Does what a merge cannot do without: renames, syncs, and removes what is left."""
    names = list(block_names(folder, BLOCKS))
    start = time.perf_counter()
    for old, new in names:
        os.rename(old, new)
    for _ in range(syncs):
        with open(folder / 'file', 'wb') as out:
            out.write(b'1')
            out.flush()
            os.fsync(out.fileno())
    shutil.rmtree(folder / 'data/2.vhd')
    return time.perf_counter() - start


def copy_all(folder):
    """Copies one VHD file over the other, in the kernel, and syncs it."""
    start = time.perf_counter()
    with open(folder / '2.vhd', 'rb', buffering=0) as source, open(folder / '1.vhd', 'r+b', buffering=0) as to:
        left = os.fstat(source.fileno()).st_size
        while left:
            left -= os.copy_file_range(source.fileno(), to.fileno(), left)
        os.fsync(to.fileno())
    return time.perf_counter() - start


def copy_each(folder):
    """Copies as many blocks as fit, each time opening both files, and syncs what it wrote."""
    size = (folder / '2.vhd').stat().st_size
    start = time.perf_counter()
    for offset in range(0, size - FULL_BLOCK, FULL_BLOCK):
        with open(folder / '2.vhd', 'rb', buffering=0) as source:
            data = os.pread(source.fileno(), FULL_BLOCK, offset)
        with open(folder / '1.vhd', 'r+b', buffering=0) as to:
            assert os.pwrite(to.fileno(), data, offset) == FULL_BLOCK
    with open(folder / '1.vhd', 'r+b', buffering=0) as to:
        os.fsync(to.fileno())
    return time.perf_counter() - start


def watched(command):
    """Returns what a program prints, and the peak of its memory in MiB, as far as was seen ten milliseconds before its end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        target, peak = Target('program', None, [], [program.pid]), 0
        while program.poll() is None:
            peak = max(peak, target.peak())
            time.sleep(0.01)
        said = program.stdout.read()
    if program.returncode:
        raise subprocess.CalledProcessError(program.returncode, command)
    return said, peak
