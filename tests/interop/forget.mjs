#!/usr/bin/env node
// Xen Orchestra judges what `xofs forget --apply` leaves, also when it dies at any step, and goes on from there.
//
// usage: forget.mjs XOFS FORGET_UNTIL WORK
//
// 1. XO lists what is left, its cleaner has nothing to do or to say, and every disk reads as it was.
// 2. XO adds a backup to the merged chain and merges in its turn.
// 3. XO begins a merge and is killed; `xofs forget` finishes it.
// 4. `xofs forget` dies after a change of the repository, the first, the twelfth and so on (XOFS_EVERY=1: after each); XO's
//    cleaner finishes it, or the next `xofs forget`.

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

const [xofs, forgetUntil, work] = process.argv.slice(2).map(path => resolve(path))
const NIGHT = 86_400_000
const EPOCH = Date.UTC(2026, 7, 1, 2, 0, 3)
const DIED = 7
const EVERY = Number(process.env.XOFS_EVERY ?? 11)

let failures = 0
const fail = message => {
  failures++
  console.log(`forget: ${message}`)
}

// exit code and what was printed
async function run(command, args) {
  try {
    const { stdout, stderr } = await promisify(execFile)(command, args)
    return { code: 0, text: stdout + stderr }
  } catch (error) {
    return { code: error.code, text: `${error.stdout ?? ''}${error.stderr ?? ''}` }
  }
}

async function makeVm(name, { useVhdDirectory, compression }, repo) {
  const random = new Random(`forget ${name}`)
  const { handler, dispose } = await openRemote(repo, { useVhdDirectory })
  const adapter = new FixtureAdapter(handler, { dirMode: 0o700, compression })
  const disks = []
  for (const [index, size] of [8 * MIB, 20 * MIB + 512].entries()) {
    const disk = new PatternDisk({
      name: `${name}-${index}`,
      workDir: join(work, 'disks'),
      random: random.fork(`disk-${index}`),
      size,
      blocks: index === 0 ? [0, 2] : [0, 3, 4, 9],
      fill: 300_000,
    })
    await disk.create()
    disks.push(disk)
  }
  const vm = new BackupVm({ adapter, random, name, disks, workDir: join(work, 'disks') })
  return { vm, disks, random, adapter, handler, dispose, truths: new Map() }
}

// the truth of each disk of each backup: metadata file → digests, sorted
async function add(entry, night) {
  const { vm, disks, random, truths } = entry
  for (const disk of disks) {
    const blocks = Math.ceil(disk.size / (2 * MIB))
    const write = Array.from({ length: random.int(1, 3) }, () => random.int(0, blocks - 1))
    await disk.change({ write, zero: random.chance(0.3) ? [random.int(0, blocks - 1)] : [] })
  }
  const { metadata } = await vm.backup(EPOCH + night * NIGHT)
  const digests = []
  for (const disk of disks) {
    const truth = join(work, 'disks', 'truth.raw')
    await disk.snapshot(truth)
    digests.push((await sha256OfFile(truth)).sha256)
    await rm(truth)
  }
  truths.set(metadata, digests.sort())
}

async function tree(folder) {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true })
  return entries.map(entry => join(entry.parentPath, entry.name)).sort()
}

// XO lists and reads the backups in `truths`; all of `kept` must be there
async function judge(repo, { vm, truths }, kept, when) {
  const { handler, dispose } = await openRemote(repo)
  try {
    const adapter = new RemoteAdapter(handler)
    const listed = (await adapter.listVmBackups(vm.uuid)).map(({ _filename }) => _filename.slice(1))
    const missing = kept.filter(metadata => !listed.includes(metadata))
    if (missing.length !== 0) {
      fail(`${when}: XO does not list ${missing}`)
    }
    for (const metadata of listed) {
      const { vhds, size, isVhdDifferencing } = JSON.parse(await readFile(join(repo, metadata), 'utf8'))
      const digests = []
      for (const path of Object.values(vhds)) {
        const { sha256, error, rawContent } = await readDisk(handler, `/${vm.dir}/${path}`)
        digests.push(error ?? sha256)
        if (rawContent !== undefined && rawContent.error !== undefined) {
          fail(`${when}: ${metadata}: vhd-lib: ${rawContent.error}`)
        }
      }
      if (!isDeepStrictEqual(digests.sort(), truths.get(metadata))) {
        fail(`${when}: ${metadata}: XO reads ${digests} instead of ${truths.get(metadata)}`)
      }
      if (!(size > 0) || Object.keys(isVhdDifferencing).length !== Object.keys(vhds).length) {
        fail(`${when}: ${metadata}: its size is ${size}, its flags ${JSON.stringify(isVhdDifferencing)}`)
      }
    }
    return listed
  } finally {
    await dispose()
  }
}

// what XO's cleaner says
async function clean(repo, vm) {
  const { handler, dispose } = await openRemote(repo)
  const said = []
  try {
    const adapter = new RemoteAdapter(handler)
    const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
    await adapter.cleanVm(vm.dir, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log })
  } catch (error) {
    said.push(shortError(error))
  } finally {
    await dispose()
  }
  return said
}

await rm(work, { recursive: true, force: true })
await mkdir(join(work, 'disks'), { recursive: true })

const KINDS = [
  { name: 'flat', useVhdDirectory: false },
  { name: 'plain', useVhdDirectory: true, compression: 'none' },
  { name: 'brotli', useVhdDirectory: true, compression: 'brotli' },
  // from the fourth night on compressed: XO destroys such chains when it merges them
  { name: 'mixed', useVhdDirectory: true, compression: 'none', laterCompression: 'brotli' },
]
for (const kind of KINDS) {
  const repo = join(work, kind.name)
  await mkdir(repo)
  const entry = await makeVm(kind.name, kind, repo)
  const { vm, truths } = entry
  for (let night = 0; night < 5; night++) {
    if (night === 3 && kind.laterCompression !== undefined) {
      vm.adapter = new FixtureAdapter(entry.handler, {
        anyParent: true,
        compression: kind.laterCompression,
        dirMode: 0o700,
      })
    }
    await add(entry, night)
  }
  const all = [...truths.keys()]

  // 4, on copies: before anything is forgotten
  const copy = join(work, 'copy')
  let steps = 0
  for (let code = DIED; code === DIED; steps += EVERY) {
    await rm(copy, { recursive: true, force: true })
    await cp(repo, copy, { recursive: true })
    const died = await run(forgetUntil, [copy, vm.uuid, '2', String(steps)])
    code = died.code
    if (code !== 0 && code !== DIED) {
      fail(`${kind.name}: step ${steps}: exit code ${code}: ${died.text}`)
      break
    }
    const when = `${kind.name}: died after ${steps} changes`
    await rm(join(copy, `${vm.dir}.lock`), { recursive: true, force: true })
    if ((steps / EVERY) % 2 === 0) {
      await clean(copy, vm)
      const said = await clean(copy, vm)
      const before = await tree(copy)
      const again = await clean(copy, vm)
      if (again.length !== 0 || !isDeepStrictEqual(await tree(copy), before)) {
        fail(`${when}: XO's cleaner does not come to an end: ${[...said, ...again]}`)
      }
    } else {
      const forgotten = await run(xofs, ['forget', copy, '--all', '--keep-last', '2', '--apply'])
      if (forgotten.code !== 0) {
        fail(`${when}: gone on: exit code ${forgotten.code}: ${forgotten.text}`)
      }
    }
    await judge(copy, entry, all.slice(-2), when)
  }
  if (steps < 30) {
    fail(`${kind.name}: forgetting takes more than ${steps} steps`)
  }

  // 1
  const forgotten = await run(xofs, ['forget', repo, '--all', '--keep-last', '2', '--apply'])
  if (forgotten.code !== 0 || !forgotten.text.includes('3 backups forgotten, 6 disks merged')) {
    fail(`${kind.name}: exit code ${forgotten.code}: ${forgotten.text}`)
  }
  const listed = await judge(repo, entry, all.slice(-2), kind.name)
  if (listed.length !== 2) {
    fail(`${kind.name}: XO lists ${listed}`)
  }
  // what a forget that died notes
  const note = join(repo, vm.dir, `../.${vm.uuid}.xofs-forget`)
  await writeFile(note, '{"disks":{},"files":[]}')
  const before = await tree(repo)
  const said = await clean(repo, vm)
  if (said.length !== 0 || !isDeepStrictEqual(await tree(repo), before)) {
    fail(`${kind.name}: XO's cleaner has something to do: ${said}`)
  }
  await rm(note)

  // 2
  vm.backups = vm.backups.filter(({ metadata }) => listed.includes(metadata))
  await add(entry, 5)
  await add(entry, 6)
  const { isVhdDifferencing } = JSON.parse(await readFile(join(repo, [...truths.keys()].at(-1)), 'utf8'))
  if (!Object.values(isVhdDifferencing).every(Boolean)) {
    fail(`${kind.name}: XO did not continue the chain: ${JSON.stringify(isVhdDifferencing)}`)
  }
  await vm.deleteBackups(vm.backups.slice(0, 1))
  await judge(repo, entry, [...truths.keys()].slice(-3), `${kind.name}: merged by XO`)
  const checked = await run(xofs, ['check', repo, '--data'])
  if (checked.code !== 0) {
    fail(`${kind.name}: xofs check: ${checked.text}`)
  }

  // 3: what XO changes fails after a few changes: it renames block files, or writes into the VHD file
  const { handler, adapter } = entry
  for (let changes = 0; changes < 4; changes++) {
    await rm(copy, { recursive: true, force: true })
    await cp(repo, copy, { recursive: true })
    const killed = await openRemote(copy, { useVhdDirectory: kind.useVhdDirectory })
    let left = changes
    for (const method of ['outputStream', 'rename', 'rmdir', 'rmtree', 'truncate', 'unlink', 'write', 'writeFile']) {
      const original = killed.handler[method].bind(killed.handler)
      killed.handler[method] = async (...args) => {
        if (left < 0 || (method === (kind.useVhdDirectory ? 'rename' : 'write') && left-- === 0)) {
          left = -1
          throw new Error('killed')
        }
        return original(...args)
      }
    }
    const killedAdapter = new RemoteAdapter(killed.handler)
    await killedAdapter.deleteVmBackups(['/' + [...truths.keys()].at(-3)]).catch(() => {})
    await killedAdapter
      .cleanVm(vm.dir, { remove: true, merge: true, lock: false, logInfo() {}, logWarn() {} })
      .catch(() => {})
    // what it had begun to write meanwhile
    await new Promise(done => setTimeout(done, 200))
    await killed.dispose()
    const finished = await run(xofs, ['forget', copy, '--all', '--keep-last', '9', '--apply'])
    if (finished.code !== 0) {
      fail(`${kind.name}: XO killed after ${changes} changes: exit code ${finished.code}: ${finished.text}`)
    }
    const kept = [...truths.keys()].slice(-2)
    await judge(copy, entry, kept, `${kind.name}: XO killed after ${changes} changes`)
    const said = await clean(copy, vm)
    if (said.length !== 0) {
      fail(`${kind.name}: XO killed after ${changes} changes, then xofs: XO's cleaner says ${said}`)
    }
  }
  console.log(`forget: ${kind.name}: XO finished or found finished what died at ${Math.ceil(steps / EVERY)} places`)
  await vm.dispose()
  await entry.dispose()
}
await rm(work, { recursive: true, force: true })
console.log(`forget: ${failures} failures`)
process.exit(failures === 0 ? 0 : 1)
