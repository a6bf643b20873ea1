#!/usr/bin/env node
// Xen Orchestra judges what `xofs ingest` writes: it lists and reads it, its cleaner has nothing to do, and it merges it. What is
// ingested after each merge is right, too: the digests that xofs keeps beside the blocks do not outlive what they are of. Full
// backups that are mirrored have the bytes that they had, also where they are long and encrypted, by xofs or by XO.
//
// usage: ingest.mjs XOFS WORK FULLS     a repository that has full backups

import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { cp, mkdir, open, readFile, readdir, rm, writeFile } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { isDeepStrictEqual, promisify } from 'node:util'

import { openRemote, RemoteAdapter } from './lib/xo.mjs'
import { MIB, sha256OfFile } from './lib/files.mjs'
import { Random } from './lib/random.mjs'
import { readDisk, shortError } from './lib/xo-read.mjs'

const [xofs, work, fulls] = process.argv.slice(2).map(path => resolve(path))
const ENCRYPTION_KEY = '73c1838d7d8a6088ca2317fb5f29cd91'

let failures = 0
const fail = message => {
  failures++
  console.log(`ingest: ${message}`)
}

async function run(args, env = {}) {
  try {
    const { stdout } = await promisify(execFile)(xofs, args, { env: { ...process.env, ...env } })
    return stdout
  } catch (error) {
    throw new Error(`xofs ${args.join(' ')}: exit code ${error.code}: ${error.stderr}`)
  }
}

async function tree(folder) {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true })
  return entries.map(entry => join(entry.parentPath, entry.name)).sort()
}

// a byte pattern in some blocks, and some made zero
async function change(image, random, blocks) {
  const file = await open(image, 'r+')
  try {
    for (let i = 0; i < 3; i++) {
      const at = random.int(0, blocks - 1) * 2 * MIB
      const bytes = random.chance(0.3) ? Buffer.alloc(2 * MIB) : Buffer.alloc(300_000, random.int(1, 255))
      await file.write(bytes, 0, bytes.length, at)
    }
  } finally {
    await file.close()
  }
}

// what XO reads of a full backup, to restore or to mirror it
async function sha256OfFull(adapter, metadata) {
  const hash = createHash('sha256')
  for await (const chunk of await adapter.readFullVmBackup(metadata)) {
    hash.update(chunk)
  }
  return hash.digest('hex')
}

async function listFulls(adapter) {
  const listed = Object.entries(await adapter.listAllVmBackups()).flatMap(([uuid, backups]) =>
    backups.filter(({ mode }) => mode === 'full').map(backup => ({ uuid, backup }))
  )
  return listed.sort((a, b) => (a.backup.id < b.backup.id ? -1 : 1))
}

// the repository that has full backups, of which those that are not compressed are too long to be encrypted in memory: of a tar
// neither XO nor xofs looks at what is between its beginning and its end
async function makeLong(repo) {
  await cp(fulls, repo, { recursive: true })
  let count = 0
  for (const file of (await tree(repo)).filter(file => file.endsWith('.xva'))) {
    const bytes = await readFile(file)
    if (['1f8b', '28b5'].includes(bytes.toString('hex', 0, 2))) {
      continue
    }
    count++
    const words = Uint32Array.from({ length: 16 * MIB + 128 }, (_, index) => Math.imul(index, 0x9e3779b1))
    const long = Buffer.concat([bytes.subarray(0, -1024), Buffer.from(words.buffer), Buffer.alloc(1024)])
    await writeFile(file, long)
    const metadata = file.replace(/xva$/, 'json')
    await writeFile(metadata, JSON.stringify({ ...JSON.parse(await readFile(metadata)), size: long.length }))
    await rm(`${file}.checksum`)
    await rm(join(file, '..', 'cache.json.gz'), { force: true })
  }
  if (count === 0) {
    fail(`${fulls} has no full backup that is not compressed`)
  }
}

// what XO itself encrypts, in order, xofs reads
async function mirrorBack(name, encryptionKey) {
  const [from, to] = [join(work, name), join(work, `${name}-back`)]
  const { handler, dispose } = await openRemote(from, { encryptionKey })
  await run(['repository', 'init', to])
  for (const { uuid, backup } of await listFulls(new RemoteAdapter(handler))) {
    const file = join('/', backup._filename, '..', backup.xva)
    const plain = join(work, 'long', file)
    await handler.unlink(file)
    await handler.outputStream(file, createReadStream(plain), { checksum: false })
    const at = basename(file, '.xva').replace(/^(\d{4})(\d{2})(\d{2})/, '$1-$2-$3')
    await run(['ingest', to, '--from', from, '--backup', `${uuid}/${at}`], { XOFS_PASSWORD: encryptionKey })
    const [expected, found] = [(await sha256OfFile(plain)).sha256, (await sha256OfFile(join(to, file))).sha256]
    if (found !== expected) {
      fail(`${name}: ${file}: xofs reads ${found} of what XO encrypted instead of ${expected}`)
    }
  }
  await dispose()
}

// every full backup of the repository of another, mirrored: XO reads the same bytes, and its cleaner has nothing to say
async function mirrorFulls(name, fulls, encryptionKey) {
  const repo = join(work, name)
  const env = encryptionKey === undefined ? {} : { XOFS_PASSWORD: encryptionKey }
  await run(['repository', 'init', repo, ...(encryptionKey === undefined ? [] : ['--encrypted'])], env)
  const source = await openRemote(fulls, {})
  const origins = await listFulls(new RemoteAdapter(source.handler))
  if (origins.length === 0) {
    fail(`${name}: ${fulls} has no full backup`)
  }
  for (const { uuid, backup } of origins) {
    const time = basename(backup._filename, '.json')
    const at = time.replace(/^(\d{4})(\d{2})(\d{2})/, '$1-$2-$3')
    await run(['ingest', repo, '--from', fulls, '--backup', `${uuid}/${at}`], env)
  }
  const { handler, dispose } = await openRemote(repo, { useVhdDirectory: true, encryptionKey })
  const adapter = new RemoteAdapter(handler)
  const copies = await listFulls(adapter)
  if (copies.length !== origins.length) {
    fail(`${name}: XO lists ${copies.map(({ backup }) => backup._filename)}`)
  }
  for (const [index, { backup }] of copies.entries()) {
    const expected = await sha256OfFull(new RemoteAdapter(source.handler), origins[index].backup)
    const found = await sha256OfFull(adapter, backup)
    if (found !== expected) {
      fail(`${name}: ${backup._filename}: XO reads ${found} instead of ${expected}`)
    }
    const xva = join('/', backup._filename, '..', backup.xva)
    if (!(await adapter.isValidXva(xva))) {
      fail(`${name}: ${xva} is not valid for XO`)
    }
  }
  const before = await tree(repo)
  const said = []
  const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
  for (const uuid of new Set(copies.map(({ uuid }) => uuid))) {
    await adapter
      .cleanVm(`xo-vm-backups/${uuid}`, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log })
      .catch(error => said.push(shortError(error)))
  }
  if (said.length !== 0 || !isDeepStrictEqual(await tree(repo), before)) {
    fail(`${name}: XO's cleaner has something to do: ${said}`)
  }
  await dispose()
  await source.dispose()
}

await rm(work, { recursive: true, force: true })
await mkdir(work, { recursive: true })
const KINDS = [
  { name: 'brotli', args: ['--format', 'exploded', '--compression', 'brotli'] },
  { name: 'gzip', args: ['--format', 'exploded', '--compression', 'gzip'] },
  { name: 'plain', args: ['--format', 'exploded', '--compression', 'none'] },
  { name: 'vhd', args: ['--format', 'vhd'] },
  { name: 'encrypted', args: [], encryptionKey: ENCRYPTION_KEY },
  // made by xofs, what the others are made by XO
  { name: 'made', args: [], isMade: true },
  { name: 'made-encrypted', args: [], encryptionKey: ENCRYPTION_KEY, isMade: true },
]
for (const { name, args, encryptionKey, isMade = false } of KINDS) {
  const random = new Random(`ingest ${name}`)
  const repo = join(work, name)
  const options = { useVhdDirectory: name !== 'vhd', encryptionKey }
  const env = encryptionKey === undefined ? {} : { XOFS_PASSWORD: encryptionKey }
  if (isMade) {
    await run(['repository', 'init', repo, ...(encryptionKey === undefined ? [] : ['--encrypted'])], env)
    const before = await tree(repo)
    // opened with another key, it must not be taken for empty and get that one
    const other = { ...options, encryptionKey: [...ENCRYPTION_KEY].reverse().join('') }
    const opened = await openRemote(repo, other).catch(() => undefined)
    if (opened !== undefined) {
      await opened.dispose()
      if (encryptionKey !== undefined) {
        fail(`${name}: XO opens it with another key`)
      }
    }
    const { dispose } = await openRemote(repo, options)
    await dispose()
    if (encryptionKey !== undefined && !isDeepStrictEqual(await tree(repo), before)) {
      fail(`${name}: XO makes it anew`)
    }
  } else {
    await mkdir(repo)
    // XO makes a repository of an empty folder
    const { dispose } = await openRemote(repo, options)
    await dispose()
    await mkdir(join(repo, 'xo-vm-backups'), { recursive: true })
  }
  const uuid = random.uuid()
  const images = [
    { image: join(work, 'system.raw'), blocks: 6, size: 12 * MIB },
    { image: join(work, 'data.raw'), blocks: 11, size: 20 * MIB + 512 },
  ]
  for (const { image, size } of images) {
    await writeFile(image, '')
    await promisify(execFile)('truncate', ['-s', String(size), image])
  }
  const truths = []
  let night = 0
  // what was compared with the backup before, in blocks
  const backUp = async () => {
    for (const { image, blocks } of images) {
      await change(image, random, blocks)
      // truncated to its size again: the last block reaches past it
    }
    for (const { image, size } of images) {
      await promisify(execFile)('truncate', ['-s', String(size), image])
    }
    truths.push((await Promise.all(images.map(async ({ image }) => (await sha256OfFile(image)).sha256))).sort())
    const disks = images.flatMap(({ image }, index) => ['--disk', `xvd${'ab'[index]}=${image}`])
    const time = `2026-08-0${++night}T02:00:03Z`
    const vm = ['--vm', uuid, '--name', 'web01']
    const told = JSON.parse(await run(['ingest', repo, ...vm, ...disks, ...args, '--time', time, '--json'], env))
    const sum = name => told.repositories[0].disks.reduce((sum, disk) => sum + disk[name], 0)
    return { byDigest: sum('comparedByDigest'), byBytes: sum('comparedByBytes') }
  }
  // all blocks but the last of the second disk, which is not a whole one
  const expectDigests = ({ byDigest, byBytes }, when) => {
    if (byDigest === 0 || byBytes > 1) {
      fail(`${name}, ${when}: ${byDigest} blocks were compared by digest, ${byBytes} by bytes`)
    }
  }
  await backUp()
  while (night < 4) {
    expectDigests(await backUp(), `night ${night}`)
  }

  const { handler, dispose } = await openRemote(repo, options)
  const adapter = new RemoteAdapter(handler)
  const dir = `xo-vm-backups/${uuid}`
  const judgeRepository = async ({ repo, handler, adapter }, count, when) => {
    const listed = (await adapter.listVmBackups(uuid)).map(({ _filename }) => _filename).sort()
    if (listed.length !== count) {
      fail(`${name}, ${when}: XO lists ${listed}`)
    }
    for (const [index, file] of listed.entries()) {
      const { vhds, isVhdDifferencing } = JSON.parse(await handler.readFile(file))
      const digests = []
      for (const path of Object.values(vhds)) {
        const { sha256, error } = await readDisk(handler, `/${dir}/${path}`)
        digests.push(error ?? sha256)
      }
      const truth = truths[truths.length - count + index]
      if (!isDeepStrictEqual(digests.sort(), truth)) {
        fail(`${name}, ${when}: ${file}: XO reads ${digests} instead of ${truth}`)
      }
      if (!Object.values(isVhdDifferencing).every(flag => flag === index > 0)) {
        fail(`${name}, ${when}: ${file}: ${JSON.stringify(isVhdDifferencing)}`)
      }
    }
    const before = await tree(repo)
    const said = []
    const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
    await adapter
      .cleanVm(dir, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log })
      .catch(error => said.push(shortError(error)))
    if (said.length !== 0 || !isDeepStrictEqual(await tree(repo), before)) {
      fail(`${name}, ${when}: XO's cleaner has something to do: ${said}`)
    }
    return listed
  }
  const judge = (count, when) => judgeRepository({ repo, handler, adapter }, count, when)
  const listed = await judge(4, 'ingested')
  // XO forgets the oldest, and merges
  await adapter.deleteVmBackups(listed.slice(0, 1))
  await adapter.cleanVm(dir, { remove: true, merge: true, lock: false, logInfo() {}, logWarn() {} })
  await judge(3, 'merged by XO')
  await backUp()
  await judge(4, 'merged by XO, and ingested again')
  await run(['forget', repo, '--all', '--keep-last', '2', '--apply'], env)
  await judge(2, 'merged by xofs')
  const again = await backUp()
  await judge(3, 'merged by xofs, and ingested again')
  // the digests of what XO merged into are gone until they are made anew
  if (again.byDigest === 0) {
    fail(`${name}, merged by xofs: no block was compared by digest`)
  }
  await new Promise(resolve => setTimeout(resolve, 2500))
  const made = JSON.parse(await run(['check', repo, '--data', '--digest-missing', '--json'], env))
  expectDigests(await backUp(), `${made.digestsMade} digests made`)
  await judge(4, 'digests made, and ingested again')
  // and reads what is mirrored elsewhere
  const mirror = join(work, `${name}-mirror`)
  await run(['repository', 'init', mirror])
  for (const backup of ['latest~1', 'latest']) {
    await run(['ingest', mirror, '--from', repo, '--backup', `${uuid}/${backup}`, '--format', 'vhd'], env)
  }
  {
    const { handler, dispose } = await openRemote(mirror, { useVhdDirectory: false })
    await judgeRepository({ repo: mirror, handler, adapter: new RemoteAdapter(handler) }, 2, 'mirrored')
    await dispose()
  }
  const checked = await run(['check', repo, '--data'], env)
  if (!checked.includes('no damage found') || !checked.includes('compared with their digests')) {
    fail(`${name}: ${checked}`)
  }
  await dispose()
}
await makeLong(join(work, 'long'))
await mirrorFulls('fulls', fulls, undefined)
await mirrorFulls('fulls-encrypted', fulls, ENCRYPTION_KEY)
await mirrorFulls('long-encrypted', join(work, 'long'), ENCRYPTION_KEY)
await mirrorBack('long-encrypted', ENCRYPTION_KEY)
await rm(work, { recursive: true, force: true })
console.log(`ingest: ${KINDS.length} kinds judged, ${failures} failures`)
process.exit(failures === 0 ? 0 : 1)
