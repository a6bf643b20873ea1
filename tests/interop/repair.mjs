#!/usr/bin/env node
// Xen Orchestra judges what `xofs repair --apply` leaves: it has nothing to clean up, reads every backup as before, goes on
// with the chain, and leaves the trash alone.
//
// usage: repair.mjs XOFS WORK
//
// 1. A VM gets faults that XO's cleaner reports; some of them it would answer by deleting what is good.
// 2. `xofs repair` plans, and does what it planned; then the cleaner has nothing to do or to say, and the trash is as it was.
// 3. `xofs repair --undo` puts everything back; the same repair is made again.
// 4. XO adds a backup, and its cleaner leaves the trash alone.

import { cp, mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { execFile } from 'node:child_process'
import { join, resolve } from 'node:path'
import { isDeepStrictEqual, promisify } from 'node:util'

import { BackupVm } from './lib/vm.mjs'
import { FixtureAdapter, openRemote, RemoteAdapter } from './lib/xo.mjs'
import { MIB, sha256OfFile } from './lib/files.mjs'
import { PatternDisk } from './lib/pattern-disk.mjs'
import { Random } from './lib/random.mjs'
import { readDisk, shortError } from './lib/xo-read.mjs'

const [xofs, work] = process.argv.slice(2).map(path => resolve(path))
const NIGHT = 86_400_000
const EPOCH = Date.UTC(2026, 7, 1, 2, 0, 3)

let failures = 0
const fail = message => {
  failures++
  console.log(`repair: ${message}`)
}

// what was printed
async function run(...args) {
  try {
    const { stdout } = await promisify(execFile)(xofs, args)
    return stdout
  } catch (error) {
    fail(`xofs ${args.join(' ')}: exit code ${error.code}: ${error.stdout ?? ''}${error.stderr ?? ''}`)
    return '{}'
  }
}

async function makeVm(name, { useVhdDirectory }, repo) {
  const random = new Random(`repair ${name}`)
  const { handler, dispose } = await openRemote(repo, { useVhdDirectory })
  const adapter = new FixtureAdapter(handler, { dirMode: 0o700 })
  const disk = new PatternDisk({
    name,
    workDir: join(work, 'disks'),
    random: random.fork('disk'),
    size: 12 * MIB,
    blocks: [0, 3, 4],
    fill: 300_000,
  })
  await disk.create()
  const vm = new BackupVm({ adapter, random, name, disks: [disk], workDir: join(work, 'disks') })
  return { vm, disk, random, dispose, truths: new Map() }
}

// the truth of the disk of each backup: metadata file → digest
async function add({ vm, disk, random, truths }, night) {
  await disk.change({ write: [random.int(0, 5), random.int(0, 5)], zero: [] })
  const { metadata } = await vm.backup(EPOCH + night * NIGHT)
  const truth = join(work, 'disks', 'truth.raw')
  await disk.snapshot(truth)
  truths.set(metadata, (await sha256OfFile(truth)).sha256)
  await rm(truth)
}

// every file below a folder, and its bytes; listing caches are XO's to make anew
async function tree(folder) {
  const files = {}
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    if (entry.isFile() && entry.name !== 'cache.json.gz') {
      const path = join(entry.parentPath, entry.name)
      files[path] = (await sha256OfFile(path)).sha256
    }
  }
  return files
}

// XO lists exactly the backups in `truths`, and reads them right
async function judge(repo, { vm, truths }, when) {
  const { handler, dispose } = await openRemote(repo)
  try {
    const adapter = new RemoteAdapter(handler)
    const vms = await adapter.listAllVms()
    if (!isDeepStrictEqual(vms, [vm.uuid])) {
      fail(`${when}: XO lists the VMs ${vms}`)
    }
    const listed = (await adapter.listVmBackups(vm.uuid)).map(({ _filename }) => _filename.slice(1))
    if (!isDeepStrictEqual(listed.sort(), [...truths.keys()].sort())) {
      fail(`${when}: XO lists ${listed}`)
    }
    for (const metadata of listed) {
      const { vhds } = JSON.parse(await readFile(join(repo, metadata), 'utf8'))
      for (const path of Object.values(vhds)) {
        const { sha256, error } = await readDisk(handler, `/${vm.dir}/${path}`)
        if (sha256 !== truths.get(metadata)) {
          fail(`${when}: ${metadata}: XO reads ${error ?? sha256} instead of ${truths.get(metadata)}`)
        }
      }
    }
  } finally {
    await dispose()
  }
}

// what XO's cleaner says
async function clean(repo, vm, options) {
  const { handler, dispose } = await openRemote(repo)
  const said = []
  try {
    const adapter = new RemoteAdapter(handler)
    const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
    await adapter.cleanVm(vm.dir, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log, ...options })
  } catch (error) {
    said.push(shortError(error))
  } finally {
    await dispose()
  }
  return said
}

// what a person, a crash, or another program left in the folder of a VM
async function breakIt(repo, entry, { useVhdDirectory }) {
  const { vm, truths } = entry
  const folder = join(repo, vm.dir)
  const [newest] = [...truths.keys()].slice(-1)
  const { vhds } = JSON.parse(await readFile(join(repo, newest), 'utf8'))
  const lineage = join(folder, Object.values(vhds)[0], '..')
  // the newest backup loses its metadata: its disk is an orphan
  await rm(join(repo, newest))
  truths.delete(newest)
  const kinds = ['orphan-disk', 'stale-cache', 'orphan-xva', 'leftover', 'broken-backup']
  await writeFile(join(folder, '20260701T020003Z.xva'), 'no XVA')
  await writeFile(join(folder, '20260701T020003Z.xva.checksum'), '$1$$00')
  await writeFile(join(folder, '.1785560403123.20260801T050003Z.xva'), 'no XVA')
  await writeFile(join(lineage, '.1785560403123.20260801T050003Z.vhd'), 'no VHD')
  // a backup that names a disk which is not there
  const [oldest] = truths.keys()
  const lost = JSON.parse(await readFile(join(repo, oldest), 'utf8'))
  for (const key of Object.keys(lost.vhds)) {
    lost.vhds[key] = lost.vhds[key].replace(/[^/]+$/, `20260910T020003Z.${useVhdDirectory ? 'alias.' : ''}vhd`)
  }
  await writeFile(join(folder, '20260910T020003Z.json'), JSON.stringify(lost))
  if (useVhdDirectory) {
    kinds.push('dead-alias', 'dangling-data')
    await writeFile(join(lineage, '20260912T020003Z.alias.vhd'), 'data/20260912T020003Z.vhd')
    await mkdir(join(lineage, 'data/20260913T020003Z.vhd/blocks/0'), { recursive: true })
    await writeFile(join(lineage, 'data/20260913T020003Z.vhd/blocks/0/1'), 'a block')
  }
  return kinds.sort()
}

await rm(work, { recursive: true, force: true })
await mkdir(join(work, 'disks'), { recursive: true })

for (const kind of [{ name: 'flat', useVhdDirectory: false }, { name: 'exploded', useVhdDirectory: true }]) {
  const repo = join(work, kind.name)
  await mkdir(repo)
  const entry = await makeVm(kind.name, kind, repo)
  const { vm } = entry
  for (let night = 0; night < 4; night++) {
    await add(entry, night)
  }
  const kinds = await breakIt(repo, entry, kind)
  const broken = await tree(repo)

  // 1
  const copy = join(work, 'copy')
  await cp(repo, copy, { recursive: true })
  const reported = await clean(copy, vm)
  if (reported.length < 4) {
    fail(`${kind.name}: XO's cleaner reports only ${reported}`)
  }
  await rm(copy, { recursive: true })

  // 2: the lost backup goes first, since it keeps what is beside it from being judged
  const done = []
  const sets = []
  const plan = join(work, 'plan.json')
  for (const include of [['--include', 'broken-backups'], []]) {
    const { vms } = JSON.parse(await run('repair', repo, ...include, '--output', plan, '--json'))
    done.push(...vms.flatMap(({ actions }) => actions.map(({ kind }) => kind)))
    const applied = JSON.parse(await run('repair', repo, '--apply', plan, '--json'))
    sets.push(...applied.vms.map(({ set }) => set))
  }
  if (!isDeepStrictEqual([...new Set(done)].sort(), kinds)) {
    fail(`${kind.name}: planned ${[...new Set(done)].sort()} instead of ${kinds}`)
  }
  await judge(repo, entry, kind.name)
  const before = await tree(repo)
  const said = await clean(repo, vm)
  if (said.length !== 0 || !isDeepStrictEqual(await tree(repo), before)) {
    fail(`${kind.name}: XO's cleaner has something to do: ${said.join('\n')}`)
  }
  const trash = join(repo, '.xofs-trash')
  if ((await readdir(trash)).length !== sets.length || sets.length !== 2) {
    fail(`${kind.name}: ${await readdir(trash)} is in the trash instead of ${sets}`)
  }

  // 3
  for (const set of [...sets].reverse()) {
    await run('repair', repo, '--undo', set)
  }
  if (!isDeepStrictEqual(await tree(repo), broken)) {
    fail(`${kind.name}: undone, it is not as it was`)
  }
  for (const include of [['--include', 'broken-backups'], []]) {
    await run('repair', repo, ...include, '--output', plan)
    await run('repair', repo, '--apply', plan)
  }

  // 4
  const trashed = await tree(trash)
  vm.backups = vm.backups.filter(({ metadata }) => entry.truths.has(metadata))
  await add(entry, 5)
  await judge(repo, entry, `${kind.name}: with a backup more`)
  const again = await clean(repo, vm)
  if (again.length !== 0 || !isDeepStrictEqual(await tree(trash), trashed)) {
    fail(`${kind.name}: with a backup more, XO's cleaner says ${again.join('\n')}, or the trash was touched`)
  }
  console.log(`repair: ${kind.name}: ${done.length} actions, and XO's cleaner, which reported ${reported.length} things, is silent`)
  await vm.dispose()
  await entry.dispose()
}
await rm(work, { recursive: true, force: true })
console.log(`repair: ${failures} failures`)
process.exit(failures === 0 ? 0 : 1)
