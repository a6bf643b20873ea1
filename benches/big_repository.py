"""Makes big backup repositories as Xen Orchestra writes them: full-size metadata, listing caches, and disks without data.

The same arguments give the same bytes. A repository that is there already is not made again.
"""
import gzip, json, random, shutil, struct, uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

BLOCK = 2 << 20
SECTOR = 512
FIRST = datetime(2026, 1, 1, 2, 0, 3, tzinfo=timezone.utc)
GIB = 1 << 30
VERSION = 1


def with_checksum(data, offset):
    return data[:offset] + struct.pack('>I', ~sum(data) & 0xFFFFFFFF) + data[offset + 4:]


def footer(size, disk_type, name):
    # The geometry is that of the largest disk that has one; nobody looks at it.
    data = struct.pack('>8sIIQI4sI4sQQHBBII16sB427s', b'conectix', 2, 0x10000, 512, 838_000_000, b'xo  ', 0x10000, b'Wi2k',
                       size, size, 65535, 16, 255, disk_type, 0, name.bytes, 0, b'')
    return with_checksum(data, 64)


def header(entries, parent, parent_name):
    data = struct.pack('>8sQQIIII16sII512s192s256s', b'cxsparse', 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, entries, BLOCK, 0,
                       parent.bytes if parent else b'', 0, 0, parent_name.encode('utf-16-be'), b'', b'')
    return with_checksum(data, 36)


def time_name(day):
    return (FIRST + timedelta(days=day)).strftime('%Y%m%dT%H%M%SZ')


def reference(rng):
    return f'OpaqueRef:{uuid.UUID(int=rng.getrandbits(128), version=4)}'


def identifier(rng):
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def vm_record(rng, vm, name, disks):
    """The record of a VM as XAPI gives it, some 4 KiB of JSON."""
    return {
        'uuid': vm, 'allowed_operations': ['changing_dynamic_range', 'migrate_send', 'hard_reboot', 'hard_shutdown',
                                           'clean_reboot', 'clean_shutdown', 'pause', 'checkpoint', 'snapshot'],
        'current_operations': {}, 'name_label': name, 'name_description': 'what it is for, in some words',
        'power_state': 'Running', 'user_version': 1, 'is_a_template': False, 'is_default_template': False,
        'suspend_VDI': 'OpaqueRef:NULL', 'resident_on': reference(rng), 'affinity': 'OpaqueRef:NULL',
        'memory_overhead': 11534336, 'memory_target': 1 << 30, 'memory_static_max': 1 << 30,
        'memory_dynamic_max': 1 << 30, 'memory_dynamic_min': 1 << 30, 'memory_static_min': 1 << 29,
        'VCPUs_params': {'weight': '256'}, 'VCPUs_max': 2, 'VCPUs_at_startup': 2,
        'actions_after_shutdown': 'destroy', 'actions_after_reboot': 'restart', 'actions_after_crash': 'restart',
        'consoles': [reference(rng)], 'VIFs': [reference(rng)], 'VBDs': [reference(rng) for _ in disks], 'VUSBs': [],
        'crash_dumps': [], 'VTPMs': [], 'PV_bootloader': '', 'PV_kernel': '', 'PV_ramdisk': '', 'PV_args': '',
        'PV_bootloader_args': '', 'PV_legacy_args': '', 'HVM_boot_policy': 'BIOS order',
        'HVM_boot_params': {'order': 'cdn', 'firmware': 'uefi'}, 'HVM_shadow_multiplier': 1,
        'platform': {'timeoffset': '0', 'device-model': 'qemu-upstream-uefi', 'secureboot': 'false', 'nx': 'true',
                     'acpi': '1', 'apic': 'true', 'pae': 'true', 'viridian': 'false', 'videoram': '8', 'vga': 'std',
                     'hpet': 'true', 'featureset': '-'.join(f'{rng.getrandbits(32):08x}' for _ in range(20))},
        'PCI_bus': '', 'recommendations': '<restrictions>' + '<restriction field="memory-static-max" max="1649267441664"/>'
        * 12 + '</restrictions>',
        'other_config': {'base_template_name': 'Debian Bookworm 12', 'import_task': reference(rng),
                         'mac_seed': identifier(rng), 'install-methods': 'cdrom,nfs,http,ftp', 'linux_template': 'true'},
        'domid': 7, 'domarch': '', 'last_boot_CPU_flags': {'vendor': 'GenuineIntel', 'features': '-'.join(
            f'{rng.getrandbits(32):08x}' for _ in range(20))}, 'is_control_domain': False, 'metrics': reference(rng),
        'guest_metrics': reference(rng), 'last_booted_record': '', 'xenstore_data': {
            'vm-data/mmio-hole-size': '268435456', 'vm-data': ''}, 'ha_always_run': False, 'ha_restart_priority': '',
        'is_a_snapshot': False, 'snapshot_of': 'OpaqueRef:NULL', 'snapshots': [reference(rng)],
        'snapshot_time': '19700101T00:00:00Z', 'transportable_snapshot_id': '', 'blobs': {}, 'tags': ['production'],
        'blocked_operations': {}, 'snapshot_info': {}, 'snapshot_metadata': '', 'parent': reference(rng),
        'children': [], 'bios_strings': {f'oem-{n}': 'Xen' for n in range(8)}, 'protection_policy': 'OpaqueRef:NULL',
        'is_snapshot_from_vmpp': False, 'snapshot_schedule': 'OpaqueRef:NULL', 'appliance': 'OpaqueRef:NULL',
        'start_delay': 0, 'shutdown_delay': 0, 'order': 0, 'VGPUs': [], 'attached_PCIs': [], 'suspend_SR': reference(rng),
        'version': 0, 'generation_id': '', 'hardware_platform_version': 0, 'has_vendor_device': False,
        'requires_reboot': False, 'reference_label': 'debian-12', 'domain_type': 'hvm', 'NVRAM': {},
    }


def metadata(rng, vm, name, job, schedule, time, disks, is_key):
    """A metadata file as a dictionary; `disks` is a list of (uuid of the disk, path of its VHD)."""
    vdis, vbds, vhds, differencing = {}, {}, {}, {}
    for number, (live, path) in enumerate(disks):
        vdi, vbd = reference(rng), reference(rng)
        device = f'xvd{chr(ord("a") + number)}'
        operations = ['generate_config', 'snapshot', 'clone', 'data_destroy', 'copy']
        vdis[vdi] = {
            'uuid': identifier(rng), 'name_label': f'{name}-{device}', 'name_description': 'Created by XO',
            'allowed_operations': operations, 'current_operations': {}, 'SR': reference(rng), 'VBDs': [vbd],
            'crash_dumps': [], 'virtual_size': 100 * GIB, 'physical_utilisation': 20 * GIB, 'type': 'user',
            'sharable': False, 'read_only': False, 'other_config': {
                'xo:backup:datetime': time, 'xo:backup:deltaChainLength': '4', 'xo:backup:job': job,
                'xo:backup:schedule': schedule, 'xo:backup:vm': vm, 'xo:base_delta_vdi': identifier(rng)},
            'storage_lock': False, 'location': identifier(rng), 'managed': True, 'missing': False,
            'parent': 'OpaqueRef:NULL', 'xenstore_data': {}, 'sm_config': {'vhd-parent': identifier(rng)},
            'is_a_snapshot': True, 'snapshot_of': reference(rng), 'snapshots': [], 'snapshot_time': time, 'tags': [],
            'allow_caching': False, 'on_boot': 'persist', 'metadata_of_pool': 'OpaqueRef:NULL',
            'metadata_latest': False, 'is_tools_iso': False, 'cbt_enabled': False, '$snapshot_of$uuid': live,
            '$SR$uuid': identifier(rng)}
        vbds[vbd] = {
            'uuid': identifier(rng), 'allowed_operations': ['attach'], 'current_operations': {}, 'VM': reference(rng),
            'VDI': vdi, 'device': device, 'userdevice': str(number), 'bootable': number == 0, 'mode': 'RW',
            'type': 'Disk', 'unpluggable': False, 'storage_lock': False, 'empty': False, 'other_config': {},
            'currently_attached': False, 'status_code': 0, 'status_detail': '', 'runtime_properties': {},
            'qos_algorithm_type': '', 'qos_algorithm_params': {}, 'qos_supported_algorithms': [],
            'metrics': reference(rng)}
        vhds[vdi] = path
        differencing[vdi] = not is_key
    record = vm_record(rng, vm, name, disks)
    return {'isVhdDifferencing': differencing, 'jobId': job, 'mode': 'delta', 'scheduleId': schedule,
            'timestamp': 1785895203000, 'vbds': vbds, 'vdis': vdis, 'version': '2.0.0', 'vifs': {}, 'vhds': vhds,
            'vm': record, 'vmSnapshot': record | {'is_a_snapshot': True, 'uuid': identifier(rng)}, 'tags': [],
            'size': 20 * GIB}


def exploded(folder, size, name, parent=None, parent_name='', held=()):
    """Writes an exploded VHD that lists the blocks `held` and has no file of any."""
    folder.mkdir(parents=True)
    entries = -(-size // BLOCK)
    (folder / 'footer').write_bytes(footer(size, 4 if parent else 3, name))
    (folder / 'header').write_bytes(header(entries, parent, parent_name))
    with open(folder / 'bat', 'wb') as table:
        # Xen Orchestra allocates a byte for each block and uses a bit.
        table.truncate(entries)
        bits = bytearray(-(-entries // 8))
        for block in held:
            bits[block // 8] |= 0x80 >> block % 8
        table.write(bits.rstrip(b'\0'))


def flat(path, size, name, parent=None, parent_name=''):
    """Writes a VHD file without any block."""
    entries = -(-size // BLOCK)
    table = -(-entries * 4 // SECTOR) * SECTOR
    last = footer(size, 4 if parent else 3, name)
    path.write_bytes(last + header(entries, parent, parent_name) + b'\xff' * table + last)


def make(folder, vms, backups, disks_per_vm=2, caches=False, chains=0, size=100 * GIB):
    """Makes a repository of `vms` × `backups`.

    `chains` is how many disks of each VM exist: one half as VHD files, the others exploded, behind aliases; each backup's is
    the child of the one before.
    """
    folder = Path(folder)
    done = folder.with_name(folder.name + '.complete')
    wanted = f'{vms} {backups} {disks_per_vm} {caches} {chains} {size} {VERSION}\n'
    if done.exists() and done.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(wanted)
    job, schedule = identifier(rng), identifier(rng)
    for number in range(vms):
        vm = identifier(rng)
        there = folder / 'xo-vm-backups' / vm
        there.mkdir(parents=True)
        disks = [identifier(rng) for _ in range(disks_per_vm)]
        # The records are made once for each VM; only what differs from backup to backup is put in.
        path = lambda which, time: (f'vdis/{job}/{disks[which]}/{time}.'
                                    + ('vhd' if which % 2 == 0 else 'alias.vhd'))
        marks = [f'@{"T" * 14}{which}@' for which in range(disks_per_vm)]
        template = metadata(rng, vm, f'vm-{number:05}', job, schedule, '@@@@@@@@@@@@@@@@',
                            [(live, mark) for live, mark in zip(disks, marks)], False)
        template = json.dumps(template, separators=(',', ':'))
        cached = []
        for day in range(backups):
            time = time_name(day)
            text = template.replace('@@@@@@@@@@@@@@@@', time)
            for which, mark in enumerate(marks):
                text = text.replace(mark, path(which, time))
            (there / f'{time}.json').write_text(text)
            if caches:
                place = f'/xo-vm-backups/{vm}/{time}.json'
                cached.append(f'{json.dumps(place)}:{text[:-1]},"_filename":"{place}","id":"{place}"}}')
        for which in range(min(chains, disks_per_vm)):
            make_chain(rng, there / Path(path(which, 'x')).parent, backups, which % 2 == 1, size)
        if caches:
            # Last, as Xen Orchestra does.
            plain = '{' + ','.join(cached) + '}'
            (there / 'cache.json.gz').write_bytes(gzip.compress(plain.encode(), 6, mtime=0))
    done.write_text(wanted)
    return folder


def make_chain(rng, folder, length, is_exploded, size, held=lambda layer: ()):
    """Writes the images of one disk; returns the name of the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    parent, parent_name, name = None, '', ''
    for layer in range(length):
        this = uuid.UUID(int=rng.getrandbits(128), version=4)
        time = time_name(layer)
        if is_exploded:
            exploded(folder / 'data' / f'{time}.vhd', size, this, parent, parent_name, held(layer))
            name = f'{time}.alias.vhd'
            (folder / name).write_text(f'data/{time}.vhd')
        else:
            name = f'{time}.vhd'
            flat(folder / name, size, this, parent, parent_name)
        parent, parent_name = this, name
    return folder / name


def make_disks(folder, length, size, blocks):
    """Makes a folder that holds a chain of exploded VHDs, each with `blocks` random blocks listed."""
    folder = Path(folder)
    done = folder.with_name(folder.name + '.complete')
    wanted = f'{length} {size} {blocks} {VERSION}\n'
    if done.exists() and done.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = random.Random(wanted)
    count = size // BLOCK
    make_chain(rng, folder, length, True, size, lambda layer: (rng.randrange(count) for _ in range(blocks)))
    done.write_text(wanted)
    return folder
