#!/usr/bin/env node
// Xen Orchestra at work on a repository that is mounted meanwhile: adds, deletes and merges backups of four VMs.
//
// usage: churn.mjs --repo DIR --truth DIR --work DIR --rounds N --seed SEED [--slow MILLISECONDS] [--xofs BINARY]
//
// Speaks JSON, a line each, on standard output, and waits for a line on standard input after each:
//   {"event":"added","vm":…,"metadata":…,"disks":[{"size":…,"truth":…}, …]}   in the order of the VM's disks
//   {"event":"removing","vm":…,"metadata":[…]}                                before the first byte is removed
//   {"event":"lost","vm":…,"metadata":…,"disk":N,"block":N,"size":BYTES}     the file of a block is gone; before "added"
//   {"event":"read"}                                                          time to read
//   {"event":"done"}
// --slow waits before each change of the repository: what XO does in an instant lasts, as over a network.
// --xofs has `xofs forget` delete and merge, half of the times when it can.

import { readFile, readdir, unlink } from 'node:fs/promises'
import { execFile } from 'node:child_process'
import { createInterface } from 'node:readline'
import { dirname, join, resolve } from 'node:path'
import { parseArgs, promisify } from 'node:util'

import { BackupVm } from './lib/vm.mjs'
import { FixtureAdapter, openRemote } from './lib/xo.mjs'
import { MIB } from './lib/files.mjs'
import { PatternDisk } from './lib/pattern-disk.mjs'
import { Random } from './lib/random.mjs'

const { values: options } = parseArgs({
  options: {
    repo: { type: 'string' },
    truth: { type: 'string' },
    work: { type: 'string' },
    rounds: { type: 'string', default: '6' },
    seed: { type: 'string', default: 'churn' },
    slow: { type: 'string', default: '0' },
    xofs: { type: 'string' },
  },
})
const slow = Number(options.slow)
const random = new Random(options.seed)

const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
async function tell(message) {
  process.stdout.write(JSON.stringify(message) + '\n')
  if ((await answers.next()).done) {
    throw new Error('nobody listens any more')
  }
}

const CHANGES = ['outputStream', 'rename', 'rmdir', 'rmtree', 'truncate', 'unlink', 'write', 'writeFile']
async function openAdapter({ useVhdDirectory, compression }) {
  const { handler, dispose } = await openRemote(resolve(options.repo), { useVhdDirectory })
  if (slow > 0) {
    for (const method of CHANGES) {
      const original = handler[method].bind(handler)
      handler[method] = async (...args) => {
        await new Promise(done => setTimeout(done, slow))
        return original(...args)
      }
    }
  }
  return { adapter: new FixtureAdapter(handler, { dirMode: 0o700, compression }), dispose }
}

// The first disk of the flat ones grows past a sector of its table (128 entries): XO then moves blocks in the parent.
// An exploded one must not grow: XO destroys it when it merges.
const KINDS = [
  { name: 'flat', grows: true },
  { name: 'flat2', grows: true },
  { name: 'brotli', useVhdDirectory: true, compression: 'brotli' },
  { name: 'plain', useVhdDirectory: true, compression: 'none' },
]
const DISK_SIZES = [6 * MIB, 40 * MIB + 512]
const GROWN_SIZES = [600 * MIB, 1200 * MIB]

const vms = []
for (const kind of KINDS) {
  const { adapter, dispose } = await openAdapter({ ...kind })
  const own = random.fork(kind.name)
  const disks = []
  for (const [index, size] of DISK_SIZES.entries()) {
    const disk = new PatternDisk({
      name: `${kind.name}-${index}`,
      workDir: options.work,
      random: own.fork(`disk-${index}`),
      size,
      blocks: index === 0 ? [0, 2] : [0, 3, 4, 9, 19],
      fill: 300_000,
    })
    await disk.create()
    disks.push(disk)
  }
  const vm = new BackupVm({ adapter, random: own, name: kind.name, disks, workDir: options.work })
  vms.push({ vm, kind, disks, dispose, random: own, grown: 0 })
}

const EPOCH = Date.UTC(2026, 7, 1, 2, 0, 3)
let night = 0

async function add({ vm, disks, random }, timestamp, { full = false, loses = false } = {}) {
  for (const disk of disks) {
    const blocks = Math.ceil(disk.size / (2 * MIB))
    const write = Array.from({ length: random.int(1, 4) }, () => random.int(0, Math.min(blocks, 150) - 1))
    const zero = random.chance(0.3) ? [random.int(0, Math.min(blocks, 20) - 1)] : []
    await disk.change({ write: [...write, blocks - 1], zero })
  }
  const { metadata } = await vm.backup(timestamp, { full })
  const truths = []
  for (const [index, disk] of disks.entries()) {
    const truth = join(options.truth, `${vm.uuid}-${timestamp}-${index}.raw`)
    await disk.snapshot(truth)
    truths.push({ size: disk.size, truth })
  }
  if (loses) {
    const { told, file } = await findBlock(metadata, disks)
    await unlink(file)
    await tell({ event: 'lost', vm: vm.uuid, metadata, ...told })
  }
  await tell({ event: 'added', vm: vm.uuid, metadata, disks: truths })
}

for (let i = 0; i < 4; i++, night++) {
  for (const entry of vms) {
    await add(entry, EPOCH + night * 86_400_000)
  }
}

const rounds = Number(options.rounds)
for (let round = 0; round < rounds; round++, night++) {
  for (const entry of random.shuffle(vms)) {
    const { vm, kind, disks, random } = entry
    if (kind.grows && entry.grown < GROWN_SIZES.length && round % 2 === 0) {
      await disks[0].grow(GROWN_SIZES[entry.grown++])
    }
    await add(entry, EPOCH + night * 86_400_000, { full: round === 3 })

    // the oldest, the oldest two, one in the middle, or all but the last: each leads to another merge
    const { backups } = vm
    const last = backups.length - 1
    const victims = [
      backups.slice(0, 1),
      backups.slice(0, 2),
      backups.slice(Math.floor(last / 2), Math.floor(last / 2) + 1),
      backups.slice(0, last),
    ][(round + vms.indexOf(entry)) % 4].filter(backup => backup !== backups[last])
    if (victims.length !== 0) {
      await tell({ event: 'removing', vm: vm.uuid, metadata: victims.map(_ => _.metadata) })
      const isOldest = backups.indexOf(victims[0]) === 0
      if (options.xofs !== undefined && kind.useVhdDirectory && isOldest && random.chance(0.5)) {
        await forget(vm, backups.length - victims.length)
      } else {
        await vm.deleteBackups(victims)
      }
    }
    await vm.cleanVm({ remove: true, merge: true, logInfo() {}, logWarn() {} })
  }
}
async function forget(vm, count) {
  const args = ['forget', options.repo, '--vm', vm.uuid, '--keep-last', String(count), '--apply', '--json']
  const { stdout } = await promisify(execFile)(options.xofs, args)
  const [{ forgotten }] = JSON.parse(stdout).applied.vms
  if (forgotten.length === 0) {
    throw new Error(`xofs forgot nothing: ${stdout}`)
  }
  await vm.lookAgain()
}

// At last a block file is lost, before a merge that will not get past it: XO gives up and leaves its state behind. The
// backup lives on, all but that block.
const plain = vms.find(_ => _.kind.name === 'plain')
await add(plain, EPOCH + night++ * 86_400_000)
await add(plain, EPOCH + night++ * 86_400_000, { loses: true })
await tell({ event: 'read' })
const older = plain.vm.backups.slice(0, -1)
await tell({ event: 'removing', vm: plain.vm.uuid, metadata: older.map(_ => _.metadata) })
await plain.vm.deleteBackups(older)
await plain.vm.cleanVm({ remove: true, merge: true, logInfo() {}, logWarn() {} }).catch(() => {})
await tell({ event: 'read' })

// A block that a backup has in a folder of its own, and which disk of the VM it belongs to.
async function findBlock(metadata, disks) {
  const path = join(options.repo, metadata)
  const { vdis, vhds } = JSON.parse(await readFile(path, 'utf8'))
  for (const [reference, name] of Object.entries(vhds)) {
    const alias = join(dirname(path), name)
    const folder = join(dirname(alias), (await readFile(alias, 'utf8')).trim())
    for (const thousand of await readdir(join(folder, 'blocks'))) {
      for (const rest of await readdir(join(folder, 'blocks', thousand))) {
        const disk = disks.findIndex(_ => _.name === vdis[reference].name_label)
        if (disk === -1) {
          throw new Error(`no disk of the VM is called ${vdis[reference].name_label}`)
        }
        const told = { disk, block: Number(thousand) * 1000 + Number(rest), size: 2 * MIB }
        return { told, file: join(folder, 'blocks', thousand, rest) }
      }
    }
  }
  throw new Error(`${metadata} has no block of its own`)
}

await tell({ event: 'done' })
for (const { vm, dispose } of vms) {
  await vm.dispose()
  await dispose()
}
process.exit(0)
