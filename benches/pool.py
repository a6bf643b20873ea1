"""Measures backups of a pool: by NBD beside nbdcopy, near and far away, and the ways to read a disk beside each other.

The pool is xapi-simulator, a process of its own, which has the disk in memory and the limits of a real server: reads one after the
other on each connection, in pieces of 512 KiB, over TLS. A far one is behind its `--nbd-round-trip`. Its CPU time is that of the
machine, too, for all that are compared.
"""
import hashlib, http.client, json, shutil, subprocess, time, urllib.parse
from contextlib import contextmanager

import disk
from reading import warm
from targets import end, start
from writing import Writing, sync, watched

MIB = 1 << 20
ROUND_TRIPS_MS = (0, 5, 20)
WRITES = 200
# The fastest that was found for it near a server; more needs more memory, and is slower there.
AT_ITS_BEST = (f'--request-size={MIB}', f'--queue-size={64 * MIB}')
VM = 'bench'
PEAK = 'Peak memory of backups of a pool'
WHOLE, INCREMENT = 'Whole disk, by way', f'Increment after {WRITES} writes, by way'
FETCHED = 'Read of the pool for that increment, by way'


def nbd_test(round_trip):
    return f'Whole disk by NBD, {round_trip} ms there and back'


class Pool:
    """A running pool whose only VM, halted, has a disk that holds an image."""

    def __init__(self, program, folder, image, *options):
        size = image.stat().st_size
        self.server = start([program, '--listen', '127.0.0.1:0', '--vm', f'{VM}:{size >> 20}MiB', '--filled', '0', '--seed', '1',
                             '--writes', str(WRITES), '--write-on-line', *options],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            said = {}
            while 'seed' not in said:
                line = self.server.stdout.readline()
                if not line:
                    raise SystemExit('bench: xapi-simulator did not start')
                name, _, value = line.partition(':  ')
                said[name.strip() or 'more'] = value.strip() or line.strip()
                if line.strip().startswith('http://'):
                    self.plain = line.split()[0].removeprefix('http://')
            self.address, self.fingerprint = said['address'], said['fingerprint']
            self.password = folder / 'password'
            self.password.write_text(said['password'])
            self.has_written = False
            self.session = self.call('session.login_with_password', said['user'], said['password'], session=False)
            vm, = self.call('VM.get_by_name_label', VM)
            self.vm, (self.vdi,) = vm, self.disks(vm)
            self.call('VM.hard_shutdown', vm)
            self.load(image)
        except BaseException:
            end(self.server)
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.server)

    def call(self, method, *arguments, session=True):
        connection = http.client.HTTPConnection(self.plain)
        arguments = ([self.session] if session else []) + list(arguments)
        connection.request('POST', '/jsonrpc', json.dumps({'jsonrpc': '2.0', 'id': 1, 'method': method, 'params': arguments}))
        answer = json.load(connection.getresponse())
        connection.close()
        if 'result' not in answer:
            raise SystemExit(f'bench: {method}: {answer.get("error")}')
        return answer['result']

    def disks(self, vm):
        devices = (self.call('VBD.get_record', vbd) for vbd in self.call('VM.get_VBDs', vm))
        return [device['VDI'] for device in devices if device['type'] == 'Disk']

    def load(self, image):
        """Fills the disk."""
        task = self.call('task.create', 'load', '')
        where = urllib.parse.urlencode({'session_id': self.session, 'task_id': task, 'vdi': self.vdi, 'format': 'raw'})
        connection = http.client.HTTPConnection(self.plain, blocksize=MIB)
        with open(image, 'rb') as file:
            connection.request('PUT', f'/import_raw_vdi/?{where}', file, {'Content-Length': str(image.stat().st_size)})
            connection.getresponse().read()
        connection.close()
        while (status := self.call('task.get_status', task)) == 'pending':
            time.sleep(0.01)
        if status != 'success':
            raise SystemExit(f'bench: the image cannot be loaded: {self.call("task.get_error_info", task)}')
        self.call('task.destroy', task)

    def write(self):
        """Has the VM write to its disk, the same after each start."""
        self.server.stdin.write('\n')
        self.server.stdin.flush()
        self.server.stdout.readline()
        self.has_written = True

    def storage(self):
        return self.call('SR.get_uuid', self.call('VDI.get_SR', self.vdi))

    @contextmanager
    def shared(self, folder):
        """The URI of a snapshot's disk, as libnbd takes it."""
        snapshot = self.call('VM.snapshot', self.vm, 'bench')
        try:
            vdi, = self.disks(snapshot)
            place = self.call('VDI.get_nbd_info', vdi)[0]
            (folder / 'ca-cert.pem').write_text(place['cert'])
            name = urllib.parse.quote(place['exportname'], safe='')
            yield f'nbds://{place["address"]}:{place["port"]}/{name}?tls-certificates={urllib.parse.quote(str(folder))}'
        finally:
            self.call('VM.destroy', snapshot)
            self.call('VDI.destroy', vdi)


class Pools:
    def __init__(self, bench):
        self.bench, self.work = bench, bench.work
        self.program = bench.args.programs / 'xapi-simulator'
        self.image = disk.make_image(bench.disks / 'images' / str(bench.args.pool)) / 'image.raw'
        self.megabytes = self.image.stat().st_size / 1e6

    def run(self):
        warm(self.image)
        self.digest = digest(self.image)
        for round_trip in ROUND_TRIPS_MS:
            self.by_nbd(round_trip)
        self.bench.report.print_test('pool', PEAK)
        self.by_way()

    def add(self, test, unit, target, value, is_speed=True):
        self.bench.add('pool', test, unit, target, value, is_speed)

    # Beside nbdcopy

    def by_nbd(self, round_trip):
        test, folder, stages = nbd_test(round_trip), self.work.new(), []
        options = ['--nbd-round-trip', str(round_trip)] if round_trip else []
        with Pool(self.program, folder, self.image, *options) as pool, pool.shared(folder) as uri:
            ways = [('xofs', lambda: self.back_up(pool, '--no-base')), ('nbdcopy', lambda: self.copy(uri, *AT_ITS_BEST)),
                    ('nbdcopy, as it is', lambda: self.copy(uri))]
            for number in range(self.bench.args.rounds):
                # Who comes first in a round is second in the next.
                for name, way in ways[::-1 if number % 2 else 1]:
                    found, seconds, peak = self.measured(way(), is_compared=number == 0)
                    self.add(test, 'MB/s', name, self.megabytes / seconds)
                    self.add(PEAK, 'MiB', f'{name}, {round_trip} ms', peak, is_speed=False)
                    if name == 'xofs':
                        self.expect(found, 'NBD + block list')
                        self.add(test, 'MB/s', 'xofs, without login and snapshot', self.megabytes / found['seconds'])
                        stages.append(found['transfer']['bottleneck']['stage'] or 'none')
        self.bench.report.print_test('pool', test)
        self.bench.report.print_pairs('pool', test, 'xofs', 'nbdcopy')
        print(f'\nbottleneck, as `--json` says: {", ".join(stages)}', flush=True)

    @contextmanager
    def copy(self, uri, *options):
        """nbdcopy opens one connection, since the server does not say that it takes several (`can_multi_conn`)."""
        file = self.work.new() / 'copy.raw'
        try:
            yield ['nbdcopy', '--flush', *options, uri, file], lambda: digest(file)
        finally:
            file.unlink(missing_ok=True)

    @contextmanager
    def back_up(self, pool, *options, repository=None):
        folder = repository or self.repository()
        try:
            command = [self.work.xofs_program, 'backup', '--pool', pool.address, '--fingerprint', pool.fingerprint,
                       '--pool-password-file', pool.password, '--state-dir', folder.with_suffix('.state'), '--vm', VM, '--to', folder,
                       '--ignore-chain', '--compression', 'none', '--json', *options]
            yield command, lambda: self.digest_of(folder)
        finally:
            if not repository:
                self.remove(folder)

    def repository(self):
        folder = self.work.new()
        (folder / 'xo-vm-backups').mkdir()
        return folder

    @staticmethod
    def remove(folder):
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_suffix('.state'), ignore_errors=True)

    def digest_of(self, repository):
        with self.work.xofs('xofs', repository) as target:
            return digest(target.path)

    def measured(self, way, is_compared):
        """Returns what a command said, its seconds and the peak of its memory in MiB; what it copied may be compared with the image."""
        with way as (command, copied):
            sync(self.work.folder)
            Writing.use_memory(self.bench.args.pool)
            begun = time.perf_counter()
            said, peak = watched(command)
            seconds = time.perf_counter() - begun
            if is_compared and copied() != self.digest:
                raise SystemExit(f'bench: {command[0]} copied other bytes than the image has: nothing to compare')
        sync(self.work.folder)
        return json.loads(said)['vms'][0]['backup'] if said else None, seconds, peak

    @staticmethod
    def expect(found, way):
        read, = found['reads']
        ways = [each['way'].partition(' (')[0] for each in read['passes']]
        if ways != [way]:
            raise SystemExit(f'bench: a disk was read by {ways}, {way} was expected')
        return read['passes'][0]['bytes']

    # The ways beside each other

    def by_way(self):
        for number in range(self.bench.args.rounds):
            folder, storage = self.work.new(), self.work.new()
            with Pool(self.program, folder, self.image, '--storage-folder', storage) as pool:
                files = ['--sr-path', f'{pool.storage()}={storage}']
                ways = [('files of the SR', 'files of the SR', files), ('NBD + CBT', 'NBD + block list', ['--cbt']),
                        ('NBD + block list', 'NBD + block list', []), ('VHD stream', 'VHD stream', ['--no-nbd'])]
                first = number % len(ways)
                for way, whole, options in ways[first:] + ways[:first]:
                    self.by_one_way(pool, way, whole, options, is_compared=number == 0)
            shutil.rmtree(storage)
        for test in (WHOLE, INCREMENT, FETCHED):
            self.bench.report.print_test('pool', test)

    def by_one_way(self, pool, way, whole, options, is_compared):
        pool.call('VDI.disable_cbt', pool.vdi)
        repository = self.repository()
        back_up = lambda: self.back_up(pool, *options, repository=repository)
        try:
            found, seconds, _ = self.measured(back_up(), is_compared=is_compared and not pool.has_written)
            self.expect(found, whole)
            if way == whole:
                self.add(WHOLE, 'MB/s', way, self.megabytes / seconds)
            pool.write()
            found, seconds, _ = self.measured(back_up(), is_compared=False)
            self.add(INCREMENT, 'seconds', way, seconds, is_speed=False)
            self.add(FETCHED, 'MiB', way, self.expect(found, way) / MIB, is_speed=False)
        finally:
            self.remove(repository)

    # Goals

    def goals(self):
        ratio = lambda round_trip: self.bench.report.paired('pool', nbd_test(round_trip), 'xofs', 'nbdcopy')
        return [(f'Whole disk by NBD, {round_trip} ms there and back, of nbdcopy', least, ratio(round_trip))
                for round_trip, least in ((0, 0.8), (20, 1))]


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
