"""Makes whole backup repositories, as Xen Orchestra lays them out."""
import gzip, json
from datetime import datetime, timedelta, timezone

import disk

KEY = b'0123456789abcdef0123456789abcdef'
VMS = 100
BACKUPS = 20


class Repository:
    """Writes files below a folder; with a key, each one sealed with chacha20-poly1305."""

    def __init__(self, folder, key=None):
        self.folder, self.key, self.sealed = folder, key, 0
        self.write_plain = disk.write_below(folder)
        if key:
            from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
            self.cipher = ChaCha20Poly1305(key)
            self.write_plain('encryption.json', b'{"algorithm":"chacha20-poly1305"}')
            self.write('metadata.json', json.dumps({'random': str(disk.identifier('random'))}).encode())

    def write(self, path, data):
        if self.key:
            # A nonce must not come twice; that it can be foreseen does no harm to what is not secret.
            self.sealed += 1
            nonce = self.sealed.to_bytes(12, 'big')
            data = nonce + self.cipher.encrypt(nonce, data, None)
        self.write_plain(path, data)

    def add_vm(self, name, count, write_disk, has_cache=False):
        """Adds a VM with one disk and `count` daily backups; write_disk(self, folder, stem) writes one
        into that folder and returns its file's name."""
        vm, vdi, job = (str(disk.identifier(f'{kind} {name}')) for kind in ('vm', 'vdi', 'job'))
        base = f'xo-vm-backups/{vm}'
        listing = {}
        for day in range(count):
            when = datetime(2026, 8, 1, 2, tzinfo=timezone.utc) + timedelta(days=day)
            stamp = when.strftime('%Y%m%dT%H%M%SZ')
            path = f'vdis/{job}/{vdi}/' + write_disk(self, f'{base}/vdis/{job}/{vdi}', stamp)
            metadata = self.metadata(name, vm, vdi, job, when, path)
            self.write(f'{base}/{stamp}.json', json.dumps(metadata, separators=(',', ':')).encode())
            filename = f'/{base}/{stamp}.json'
            listing[filename] = {**metadata, '_filename': filename, 'id': filename}
        if has_cache:
            self.write(f'{base}/cache.json.gz', gzip.compress(json.dumps(listing).encode(), mtime=0))

    @staticmethod
    def metadata(name, vm, vdi, job, when, path):
        machine = {'uuid': vm, 'name_label': name, 'name_description': '', 'is_a_template': False, 'is_a_snapshot': False,
                   'power_state': 'Running', 'platform': {'acpi': '1', 'apic': 'true', 'pae': 'true'}, 'tags': [],
                   'other_config': {f'key-{number}': 'x' * 40 for number in range(20)}}
        return {
            'jobId': job, 'mode': 'delta', 'scheduleId': str(disk.identifier('schedule')),
            'timestamp': int(when.timestamp() * 1000), 'version': '2.0.0',
            'isVhdDifferencing': {'OpaqueRef:vdi': False},
            'vbds': {'OpaqueRef:vbd': {'uuid': str(disk.identifier(f'vbd {name}')), 'VM': 'OpaqueRef:vm', 'VDI': 'OpaqueRef:vdi',
                                       'device': 'xvda', 'userdevice': '0', 'bootable': True, 'mode': 'RW', 'type': 'Disk'}},
            'vdis': {'OpaqueRef:vdi': {'uuid': str(disk.identifier(f'snapshot {name}')), 'name_label': 'system',
                                       'name_description': '', 'virtual_size': disk.FORMATS_SIZE, 'type': 'user',
                                       '$snapshot_of$uuid': vdi}},
            'vifs': {}, 'vhds': {'OpaqueRef:vdi': path}, 'vm': machine, 'vmSnapshot': machine, 'size': 5120,
        }


@disk.once
def make_encrypted(folder):
    """The content of disk.make_formats as a backup in an encrypted repository, brotli inside, as Xen Orchestra writes it;
    beside it `key`."""
    def write_disk(repository, base, stamp):
        disk.write_exploded(lambda path, data: repository.write(f'{base}/data/{stamp}.vhd/{path}', data), disk.FORMATS_SIZE,
                            disk.identifier('encrypted'), lambda block: disk.content(0, block), 'brotli')
        repository.write(f'{base}/{stamp}.alias.vhd', f'data/{stamp}.vhd'.encode())
        return f'{stamp}.alias.vhd'

    Repository(folder / 'repository', KEY).add_vm('encrypted', 1, write_disk)
    (folder / 'key').write_bytes(KEY)


@disk.once
def make_listings(folder):
    """Two repositories of 100 VMs with 20 backups, {cached,uncached}: with and without Xen Orchestra's listing cache."""
    def write_disk(repository, base, stamp):
        path = repository.folder / base / f'{stamp}.vhd'
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_vhd(path, disk.FORMATS_SIZE, disk.identifier(f'{base} {stamp}'), [], None)
        return path.name

    for name in ('cached', 'uncached'):
        repository = Repository(folder / name)
        for number in range(VMS):
            repository.add_vm(f'vm{number:03}', BACKUPS, write_disk, has_cache=name == 'cached')
