#!/usr/bin/env python3
"""Measures reading a mounted disk against other ways to read the same bytes.

usage: read.py XOFS FOLDER [--rounds N] [--seconds N]

Targets, all of equal content, mounted once with default settings, then measured in turn (A B C D A B C D ...):

  plain       the raw file itself: the limit
  xofs        `xofs mount` of a chain of 5 VHD files
  xofs, one   the same of a single VHD
  qemu        qemu-storage-daemon's FUSE export of that single VHD (it reads no chain of Xen Orchestra's right)
  vhdimount   libvhdi's mount of the chain

The files under them are in the page cache; what the kernel cached of a mounted file is dropped before each measurement.
Prints the median of each, and its ratio to the plain file and to the best other mount.
"""
import argparse, hashlib, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import disk


def drop(path):
    """Makes the kernel forget what it cached of one file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def sequential(path, request=1 << 20):
    """MB/s of one pass."""
    buffer = bytearray(request)
    fd = os.open(path, os.O_RDONLY)
    try:
        offset, start = 0, time.perf_counter()
        while (got := os.preadv(fd, [buffer], offset)) > 0:
            offset += got
        return offset / 1e6 / (time.perf_counter() - start)
    finally:
        os.close(fd)


def random_reads(path, jobs, seconds):
    """Reads of 4 KiB a second. What is cached is the caller's to drop: for fio the plain file would leave memory, too."""
    said = subprocess.run(
        ['fio', '--name=r', f'--filename={path}', '--ioengine=psync', '--rw=randread', '--bs=4k', f'--numjobs={jobs}',
         '--invalidate=0', '--time_based', f'--runtime={seconds}', '--group_reporting', '--output-format=json',
         '--readonly', '--randseed=1', '--allow_file_create=0'], check=True, capture_output=True, text=True).stdout
    return json.loads(said[said.index('{'):])['jobs'][0]['read']['iops']


class Target:
    """One way to read the disk: `path` is the file to read; leaving unmounts."""

    def __init__(self, name, path, stop=lambda: None):
        self.name, self.path, self.stop = name, path, stop


def wait_for(ready, what):
    end = time.monotonic() + 20
    while not ready():
        if time.monotonic() > end:
            sys.exit(f'bench: {what} was not ready within 20 s')
        time.sleep(0.02)


def mount_xofs(name, xofs, source, mount, stem):
    mount.mkdir()
    server = subprocess.Popen([xofs, 'mount', source, mount])
    wait_for(lambda: os.path.ismount(mount) or server.poll() is not None, name)
    if server.poll() is not None:
        sys.exit(f'bench: xofs mount ended with {server.returncode}')

    def stop():
        subprocess.run([xofs, 'unmount', mount], check=True)
        server.wait(20)

    files = [path for path in mount.rglob('*.raw') if path.stem == stem]
    if len(files) != 1:
        stop()
        sys.exit(f'bench: {source} mounted shows {len(files)} files named {stem}.raw instead of one')
    return Target(name, files[0], stop)


def export_qemu(vhd, point):
    point.touch()
    server = subprocess.Popen(
        ['qemu-storage-daemon', '--blockdev', f'driver=file,node-name=f,filename={vhd},read-only=on',
         '--blockdev', 'driver=vpc,node-name=d,file=f,read-only=on',
         '--export', f'type=fuse,id=e,node-name=d,mountpoint={point}'])
    wait_for(lambda: point.stat().st_size > 0 or server.poll() is not None, 'qemu-storage-daemon')
    if server.poll() is not None:
        sys.exit(f'bench: qemu-storage-daemon ended with {server.returncode}')

    def stop():
        server.terminate()
        server.wait(20)

    return Target('qemu', point, stop)


def mount_libvhdi(vhd, mount):
    mount.mkdir()
    subprocess.run(['vhdimount', vhd, mount], check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    # One file for each of the chain, the leaf last.
    wait_for(lambda: any(mount.iterdir()), 'vhdimount')
    leaf = max(mount.iterdir(), key=lambda path: int(path.name.removeprefix('vhdi')))
    return Target('vhdimount', leaf, lambda: subprocess.run(['fusermount3', '-u', mount], check=True))


def table(title, unit, targets, results):
    medians = {target.name: statistics.median(results[target.name]) for target in targets}
    peer = max(medians['qemu'], medians['vhdimount'])
    print(f'\n{title}, {unit}, median of {len(results["plain"])} (lowest to highest)\n')
    print(f'| target | {unit} | spread | of the plain file | of the best peer |')
    print('|---|---:|---:|---:|---:|')
    for target in targets:
        runs, median = results[target.name], medians[target.name]
        print(f'| {target.name} | {median:,.0f} | {min(runs):,.0f} to {max(runs):,.0f} | {median / medians["plain"]:.2f} '
              f'| {median / peer:.2f} |')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('xofs', type=Path)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--seconds', type=int, default=3)
    args = parser.parse_args()
    disk.make(args.folder)
    chain, one, plain = args.folder / 'chain', args.folder / 'one', args.folder / 'plain.raw'
    leaf = chain / f'{disk.LAYERS - 1}.vhd'
    targets = [Target('plain', plain)]
    with tempfile.TemporaryDirectory(prefix='xofs-bench-', dir=args.folder) as work:
        work = Path(work)
        try:
            targets.append(mount_xofs('xofs', args.xofs, chain, work / 'xofs', leaf.stem))
            targets.append(mount_xofs('xofs, one', args.xofs, one, work / 'xofs-one', 'one'))
            targets.append(export_qemu(one / 'one.vhd', work / 'qemu.raw'))
            targets.append(mount_libvhdi(leaf, work / 'vhdimount'))
            measure(args, targets, [plain, *sorted(chain.iterdir()), *one.iterdir()])
        finally:
            for target in reversed(targets):
                target.stop()


def measure(args, targets, sources):
    sums = {}
    for target in targets:
        with open(target.path, 'rb') as file:
            sums[target.name] = hashlib.file_digest(file, 'sha256').hexdigest()
    wrong = [name for name, found in sums.items() if found != sums['plain']]
    if wrong:
        sys.exit(f'bench: {", ".join(wrong)} reads other bytes than the plain file: nothing to compare')
    for source in sources:
        sequential(source)
    tests = [
        ('Sequential first read, 1 MiB requests', 'MB/s', sequential),
        ('Random 4 KiB, 1 reader', 'reads/s', lambda path: random_reads(path, 1, args.seconds)),
        ('Random 4 KiB, 4 readers', 'reads/s', lambda path: random_reads(path, 4, args.seconds)),
    ]
    for title, unit, test in tests:
        results = {target.name: [] for target in targets}
        for _ in range(args.rounds):
            for target in targets:
                # The plain file stays cached: its page cache is the source of all.
                if target.name != 'plain':
                    drop(target.path)
                results[target.name].append(test(target.path))
        table(title, unit, targets, results)


main()
