"""Makes the disk that is measured: a chain of VHD files as Xen Orchestra writes them, and the same content as one VHD
and as a raw file. The same arguments give the same bytes.
"""
import random, struct, uuid
from pathlib import Path

BLOCK = 2 << 20
SECTOR = 512
LAYERS = 5
SIZE = 1 << 30
# Seconds since 2000-01-01, as VHDs count them; any fixed time will do.
TIMESTAMP = 838_000_000


def checksum(data):
    return ~sum(data) & 0xFFFFFFFF


def with_checksum(data, offset):
    return data[:offset] + struct.pack('>I', checksum(data)) + data[offset + 4:]


def geometry(sectors):
    """Cylinders, heads, sectors: VHD specification, appendix "CHS Calculation"."""
    sectors = min(sectors, 65535 * 16 * 255)
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
    data = struct.pack('>8sIIQI4sI4sQQHBBII16sB427s', b'conectix', 2, 0x10000, 512, TIMESTAMP, b'xo  ', 0x10000, b'Wi2k',
                       size, size, cylinders, heads, per_track, disk_type, 0, identifier.bytes, 0, b'')
    return with_checksum(data, 64)


def header(entries, parent, parent_name):
    name = parent_name.encode('utf-16-be').ljust(512, b'\0')
    data = struct.pack('>8sQQIIII16sII512s192s256s', b'cxsparse', 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, entries, BLOCK, 0,
                       parent.bytes if parent else b'', TIMESTAMP if parent else 0, 0, name, b'', b'')
    return with_checksum(data, 36)


def write_vhd(path, size, identifier, blocks, content, parent=None, parent_name=''):
    """Writes a VHD holding `blocks`, ascending; content(block) gives its 2 MiB."""
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
            out.write(content(block))
        out.write(last)


def make(folder, size=SIZE, layers=LAYERS, seed='bench'):
    """Makes folder/chain/0.vhd .. (layers - 1).vhd, folder/one/one.vhd and folder/plain.raw, unless they are there."""
    folder = Path(folder)
    done = folder / 'complete'
    wanted = f'{size} {layers} {seed} 1\n'
    if done.exists() and done.read_text() == wanted:
        return
    (folder / 'chain').mkdir(parents=True, exist_ok=True)
    (folder / 'one').mkdir(exist_ok=True)
    rng = random.Random(seed)
    count = -(-size // BLOCK)
    holds = [sorted(rng.sample(range(count), count * 6 // 10))]
    holds += [sorted(rng.sample(range(count), count // 10)) for _ in range(layers - 1)]

    def content(layer):
        return lambda block: random.Random(f'{seed}/{layer}/{block}').randbytes(BLOCK)

    newest = {block: layer for layer, blocks in enumerate(holds) for block in blocks}
    identifiers = [uuid.UUID(int=rng.getrandbits(128), version=4) for _ in range(layers + 1)]
    for layer, blocks in enumerate(holds):
        parent = identifiers[layer - 1] if layer else None
        write_vhd(folder / 'chain' / f'{layer}.vhd', size, identifiers[layer], blocks, content(layer), parent,
                  f'{layer - 1}.vhd' if layer else '')
    merged = sorted(newest)
    write_vhd(folder / 'one' / 'one.vhd', size, identifiers[-1], merged, lambda block: content(newest[block])(block))
    with open(folder / 'plain.raw', 'wb') as out:
        out.truncate(size)
        for block in merged:
            out.seek(block * BLOCK)
            out.write(content(newest[block])(block))
    done.write_text(wanted)
