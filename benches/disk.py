"""Makes the disks that are measured, as Xen Orchestra writes them. The same arguments give the same bytes, which
compress about 2:1.

Each `make_` function fills a folder once: it leaves a mark there, and does nothing if it finds it.
"""
import gzip, random, shutil, struct, subprocess, uuid
from functools import cache
from pathlib import Path

BLOCK = 2 << 20
SECTOR = 512
LAYERS = 5
CHAIN_SIZE = 1 << 30
FORMATS_SIZE = 512 << 20
GUEST_SIZE = 256 << 20
LENGTHS = [1, 10, 100, 1000]
# Seconds since 2000-01-01, as VHDs count them; any fixed time will do.
TIMESTAMP = 838_000_000
# Written into the marks: another number makes all disks anew.
VERSION = 2


def checksum(data):
    return ~sum(data) & 0xFFFFFFFF


def with_checksum(data, offset):
    return data[:offset] + struct.pack('>I', checksum(data)) + data[offset + 4:]


def geometry(sectors):
    """Cylinders, heads, sectors of a disk below 128 GiB: VHD specification, appendix "CHS Calculation"."""
    per_track, heads = 17, 0
    if sectors >= 65535 * 16 * 63:
        per_track, heads = 255, 16
        cylinders_heads = sectors // per_track
    else:
        cylinders_heads = sectors // per_track
        heads = max((cylinders_heads + 1023) // 1024, 4)
        if cylinders_heads >= heads * 1024 or heads > 16:
            per_track, heads = 31, 16
            cylinders_heads = sectors // per_track
        if cylinders_heads >= heads * 1024:
            per_track, heads = 63, 16
            cylinders_heads = sectors // per_track
    return cylinders_heads // heads, heads, per_track


def footer(size, disk_type, identifier):
    cylinders, heads, per_track = geometry(size // SECTOR)
    data = struct.pack('>8sIIQI4sI4sQQHBBII16sB427s',
                       b'conectix', 2, 0x10000, 512, TIMESTAMP, b'xo  ', 0x10000, b'Wi2k', size, size,
                       cylinders, heads, per_track, disk_type, 0, identifier.bytes, 0, b'')
    return with_checksum(data, 64)


def header(entries, parent, parent_name):
    name = parent_name.encode('utf-16-be').ljust(512, b'\0')
    data = struct.pack('>8sQQIIII16sII512s192s256s', b'cxsparse', 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, entries, BLOCK, 0,
                       parent.bytes if parent else b'', TIMESTAMP if parent else 0, 0, name, b'', b'')
    return with_checksum(data, 36)


@cache
def samples():
    """64 blocks of words, which gzip at level 1 and brotli at quality 0 halve."""
    rng = random.Random('words')
    words = [rng.randbytes(rng.randint(4, 12)) for _ in range(2048)]
    return [b''.join(rng.choices(words, k=BLOCK // 7))[:BLOCK] for _ in range(64)]


def content(layer, block):
    """The 2 MiB of a block: a sample, and every 64 KiB where it belongs."""
    data = bytearray(samples()[(layer * 7 + block) % 64])
    for offset in range(0, BLOCK, 64 << 10):
        struct.pack_into('>III', data, offset, layer, block, offset)
    return bytes(data)


def identifier(name):
    return uuid.UUID(int=random.Random(name).getrandbits(128), version=4)


def write_vhd(path, size, identifier, blocks, content, parent=None, parent_name=''):
    """Writes a VHD holding `blocks`, ascending; content(block) gives the 2 MiB of one, or None for a hole of zeroes."""
    entries = -(-size // BLOCK)
    table_bytes = -(-entries * 4 // SECTOR) * SECTOR
    place = (1536 + table_bytes) // SECTOR
    table = [0xFFFFFFFF] * (table_bytes // 4)
    for block in blocks:
        table[block] = place
        place += 1 + BLOCK // SECTOR
    last = footer(size, 4 if parent else 3, identifier)
    with open(path, 'wb') as out:
        out.write(last)
        out.write(header(entries, parent, parent_name))
        out.write(struct.pack(f'>{len(table)}I', *table))
        for block in blocks:
            out.write(b'\xff' * SECTOR)
            data = content(block)
            if data is None:
                out.seek(BLOCK, 1)
            else:
                out.write(data)
        out.write(last)


def write_exploded(write, size, identifier, content, filter_name=None):
    """Writes an exploded VHD of all blocks with write(path within it, bytes), through a filter."""
    if filter_name == 'brotli':
        import brotli
        encode = lambda data: brotli.compress(data, quality=0)
    elif filter_name == 'gzip':
        encode = lambda data: gzip.compress(data, compresslevel=1, mtime=0)
    else:
        encode = lambda data: data
    entries = -(-size // BLOCK)
    for block in range(entries):
        write(f'blocks/{block // 1000}/{block % 1000}', encode(b'\xff' * SECTOR + content(block)))
    write('footer', encode(footer(size, 3, identifier)))
    write('header', encode(header(entries, None, '')))
    if filter_name:
        write('chunk-filters.json', f'["{filter_name}"]'.encode())
    # A bit per block; as Xen Orchestra does, a byte of room for each.
    bits = int('1' * entries + '0' * (-entries % 8), 2).to_bytes(-(-entries // 8), 'big')
    write('bat', encode(bits.ljust(entries, b'\0')))


def once(make):
    """Has make(folder) run only if the folder does not hold what it makes."""
    def made(folder):
        folder = Path(folder)
        mark, wanted = folder / 'complete', f'{make.__name__} {VERSION}\n'
        if not (mark.exists() and mark.read_text() == wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            mark.write_text(wanted)
        return folder
    return made


@once
def make_chain(folder):
    """chain/0.vhd .. 4.vhd of 1 GiB, and of the same content one/one.vhd and plain.raw."""
    (folder / 'chain').mkdir()
    (folder / 'one').mkdir()
    rng = random.Random('chain')
    count = CHAIN_SIZE // BLOCK
    holds = [sorted(rng.sample(range(count), count * 6 // 10))]
    holds += [sorted(rng.sample(range(count), count // 10)) for _ in range(LAYERS - 1)]
    newest = {block: layer for layer, blocks in enumerate(holds) for block in blocks}
    for layer, blocks in enumerate(holds):
        parent = (identifier(f'chain {layer - 1}'), f'{layer - 1}.vhd') if layer else ()
        write_vhd(folder / 'chain' / f'{layer}.vhd', CHAIN_SIZE, identifier(f'chain {layer}'), blocks,
                  lambda block: content(layer, block), *parent)
    merged = sorted(newest)
    write_vhd(folder / 'one' / 'one.vhd', CHAIN_SIZE, identifier('one'), merged,
              lambda block: content(newest[block], block))
    with open(folder / 'plain.raw', 'wb') as out:
        out.truncate(CHAIN_SIZE)
        for block in merged:
            out.seek(block * BLOCK)
            out.write(content(newest[block], block))


def write_below(folder):
    """Returns what writes files below a folder, making the folders between."""
    def write(path, data):
        path = folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return write


@once
def make_formats(folder):
    """Of one content of 512 MiB: plain.raw, one.vhd, and {plain,gzip,brotli}/disk.vhd, exploded."""
    write_vhd(folder / 'one.vhd', FORMATS_SIZE, identifier('one'), range(FORMATS_SIZE // BLOCK),
              lambda block: content(0, block))
    with open(folder / 'plain.raw', 'wb') as out:
        for block in range(FORMATS_SIZE // BLOCK):
            out.write(content(0, block))
    for name, filter_name in [('plain', None), ('gzip', 'gzip'), ('brotli', 'brotli')]:
        write_exploded(write_below(folder / name / 'disk.vhd'), FORMATS_SIZE, identifier(name),
                       lambda block: content(0, block), filter_name)


@once
def make_image(folder):
    """image.raw, of as many GiB as the folder's name says; all of it holds data."""
    with open(folder / 'image.raw', 'wb') as out:
        for block in range((int(folder.name) << 30) // BLOCK):
            out.write(content(0, block))


@once
def make_guest(folder):
    """plain.raw, ext4 with large and small files, and the same as one/one.vhd."""
    files = folder / 'files'
    write = write_below(files)
    for number in range(32):
        write(f'large/{number}', content(1, number * 2) + content(1, number * 2 + 1))
    for number in range(2000):
        write(f'small/{number // 100}/{number}', content(2, number % 64)[number * 256:][:4096 + number * 8])
    raw = folder / 'plain.raw'
    subprocess.run(['mke2fs', '-q', '-t', 'ext4', '-O', '^has_journal', '-U', str(identifier('guest')),
                    '-E', f'hash_seed={identifier("hash")}', '-d', files, raw, f'{GUEST_SIZE >> 20}M'],
                   check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(files)
    blocks = {}
    with open(raw, 'rb') as source:
        for block in range(GUEST_SIZE // BLOCK):
            data = source.read(BLOCK)
            if data.strip(b'\0'):
                blocks[block] = data
    (folder / 'one').mkdir()
    write_vhd(folder / 'one' / 'one.vhd', GUEST_SIZE, identifier('guest'), sorted(blocks), blocks.__getitem__)


@once
def make_lengths(folder):
    """A folder for each of LENGTHS with a chain so long: 0.vhd, 1.vhd ... of a disk of 64 GiB, a block in each."""
    size = 64 << 30
    for length in LENGTHS:
        (folder / str(length)).mkdir()
        for layer in range(length):
            parent = (identifier(f'{length} {layer - 1}'), f'{layer - 1}.vhd') if layer else ()
            write_vhd(folder / str(length) / f'{layer}.vhd', size, identifier(f'{length} {layer}'), [layer],
                      lambda block: None, *parent)
