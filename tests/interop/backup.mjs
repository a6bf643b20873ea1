#!/usr/bin/env node
// Xen Orchestra judges what `xofs backup` writes of a pool, and goes on from there: it lists, checks and reads it, puts its own next
// backup on the newest one, forgets what expired and merges; and the next `xofs backup` goes on from that. What is right is what
// the simulated pool exports of the snapshot that each backup was read of, while the machine goes on writing.
//
// usage: backup.mjs XOFS SIMULATOR WORK

import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream } from 'node:fs'
import { copyFile, mkdir, readdir, readFile, rm } from 'node:fs/promises'
import { get } from 'node:http'
import { basename, join, resolve } from 'node:path'
import { createInterface } from 'node:readline'
import { pipeline } from 'node:stream/promises'
import { isDeepStrictEqual, promisify } from 'node:util'

import { CONFIG, FixtureAdapter, IncrementalRemoteWriter, openRemote, SETTINGS, xoWarnings } from './lib/xo.mjs'
import { listFiles, MIB, sha256OfFile, sha256OfStream, writeAt } from './lib/files.mjs'
import { Random } from './lib/random.mjs'
import { RawSnapshotDisk } from './lib/source-disk.mjs'
import { readDisk, shortError } from './lib/xo-read.mjs'

const [xofs, simulator, work] = process.argv.slice(2).map(path => resolve(path))
const ENCRYPTION_KEY = '73c1838d7d8a6088ca2317fb5f29cd91'
const VM = 'web01'
const MACHINE = ['--vm', `${VM}:24MiB,10MiB,4MiB!`, '--filled', '50']
const RETENTION = 3
// of one run of a program; generous, since slow machines are not wrong
const PATIENCE_MS = 180_000

let failures = 0
const fail = message => {
  failures++
  console.log(`backup: ${message}`)
}

async function run(command, args, env = {}) {
  try {
    const { stdout } = await promisify(execFile)(command, args, { env: { ...process.env, ...env }, timeout: PATIENCE_MS })
    return stdout
  } catch (error) {
    throw new Error(`${basename(command)} ${args.join(' ')}: ${error.signal ?? `exit code ${error.code}`}: ${error.stdout}${error.stderr}`)
  }
}

// a simulated pool, and a client of it that is not xofs
class Pool {
  #child
  #said = []
  #session
  #wake = () => {}

  static async start(args) {
    const pool = new Pool()
    pool.#child = spawn(simulator, ['--listen', '127.0.0.1:0', '--seed', '1', ...args], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    createInterface(pool.#child.stdout).on('line', line => {
      pool.#said.push(line)
      pool.#wake()
    })
    const ended = once(pool.#child, 'exit').then(([code]) => {
      throw new Error(`${basename(simulator)} ended with ${code}`)
    })
    ended.catch(() => {})
    await Promise.race([pool.#until(lines => lines.some(line => line.startsWith('seed:'))), ended])
    const find = expression => pool.#said.map(line => line.match(expression)?.[1]).find(found => found !== undefined)
    pool.address = find(/^address: +(.*)$/)
    pool.http = find(/(http:.*) without TLS/)
    pool.fingerprint = find(/^fingerprint: +(.*)$/)
    pool.password = find(/^password: +(.*)$/)
    pool.#session = await pool.#ask('session.login_with_password', [find(/^user: +(.*)$/), pool.password, '1.0', 'test'])
    return pool
  }

  async #until(isThere) {
    while (!isThere(this.#said)) {
      await new Promise(resolve => {
        this.#wake = resolve
      })
    }
  }

  async #ask(method, params) {
    const body = JSON.stringify({ jsonrpc: '2.0', id: 1, method, params })
    const { error, result } = await (await fetch(`${this.http}/jsonrpc`, { method: 'POST', body })).json()
    if (error !== undefined) {
      throw new Error(`${method}: ${JSON.stringify(error)}`)
    }
    return result
  }

  call(method, ...params) {
    return this.#ask(method, [this.#session, ...params])
  }

  // waits until the machine has written once more
  async write() {
    const count = this.#said.filter(line => line.includes('wrote')).length
    await this.#until(lines => lines.filter(line => line.includes('wrote')).length > count)
  }

  // writes the content of a disk to a file
  async export(ref, path) {
    const parameters = new URLSearchParams({ session_id: this.#session, vdi: ref, format: 'raw' })
    // not fetch: the body ends with the connection
    const [answer] = await once(get(`${this.http}/export_raw_vdi/?${parameters}`), 'response')
    if (answer.statusCode !== 200) {
      throw new Error(`export of a disk: ${answer.statusCode}`)
    }
    await pipeline(answer, createWriteStream(path))
    return (await sha256OfFile(path)).sha256
  }

  // destroys a disk; its host holds it for a moment after an export
  async destroy(ref) {
    for (let tries = 1; ; tries++) {
      try {
        return await this.call('VDI.destroy', ref)
      } catch (error) {
        if (tries === 600 || !error.message.includes('VDI_IN_USE')) {
          throw error
        }
        await new Promise(resolve => setTimeout(resolve, 50))
      }
    }
  }

  async close() {
    if (this.#child.exitCode === null) {
      this.#child.kill()
      await once(this.#child, 'exit')
    }
  }
}

// a repository that `xofs backup` writes to and Xen Orchestra has opened
class World {
  constructor(name, pool, { args, compression = 'brotli', encryptionKey, useVhdDirectory = true }) {
    Object.assign(this, { name, pool, args, compression, encryptionKey, useVhdDirectory })
    this.folder = join(work, name)
    this.repo = join(this.folder, 'repository')
    this.env = {
      XOFS_POOL_PASSWORD: pool.password,
      ...(encryptionKey === undefined ? {} : { XOFS_PASSWORD: encryptionKey }),
    }
    // file of metadata → disk, as it is called there → digest
    this.truths = new Map()
  }

  async open() {
    await mkdir(this.folder)
    await this.xofs('repository', 'init', this.repo, ...(this.encryptionKey === undefined ? [] : ['--encrypted']))
    const { useVhdDirectory, encryptionKey, compression } = this
    const { handler, dispose } = await openRemote(this.repo, { useVhdDirectory, encryptionKey })
    Object.assign(this, { handler, dispose, adapter: new FixtureAdapter(handler, { dirMode: 0o700, compression }) })
  }

  xofs(...args) {
    return run(xofs, args, this.env)
  }

  fail(when, message) {
    fail(`${this.name}, ${when}: ${message}`)
  }

  // what xofs says of the VM
  async backUp() {
    const { address, fingerprint } = this.pool
    const reached = ['--pool', address, '--fingerprint', fingerprint, '--state-dir', join(this.folder, 'state')]
    const { vms } = JSON.parse(
      await this.xofs('backup', ...reached, '--vm', VM, '--to', this.repo, '--json', ...this.args)
    )
    this.uuid = vms[0].uuid
    return vms[0].backup
  }

  get dir() {
    return `xo-vm-backups/${this.uuid}`
  }

  raw(vdiUuid) {
    return join(this.folder, `${vdiUuid}.raw`)
  }

  async listed() {
    return (await this.adapter.listVmBackups(this.uuid)).map(({ _filename }) => _filename).sort()
  }

  // a backup of the disks, which are read in this way
  async increment(way, when) {
    const { reads } = await this.backUp()
    const ways = reads.map(({ passes }) => passes.at(-1).way)
    if (ways.length !== 2 || !ways.every(found => found.startsWith(way))) {
      this.fail(when, `disks were read by ${ways}`)
    }
    const file = (await this.listed()).at(-1)
    const digests = {}
    for (const [ref, { uuid }] of Object.entries(JSON.parse(await this.handler.readFile(file)).vdis)) {
      digests[ref] = await this.pool.export(await this.pool.call('VDI.get_by_uuid', uuid), this.raw(uuid))
    }
    this.truths.set(file, digests)
  }

  // XO lists so many backups of those that were made last, all disks are right, and its cleaner has nothing to do
  async judge(count, when) {
    const listed = await this.listed()
    if (!isDeepStrictEqual(listed, [...this.truths.keys()].slice(-count))) {
      this.fail(when, `XO lists ${listed}`)
    }
    for (const [index, file] of listed.entries()) {
      const { vbds, vhds, isVhdDifferencing } = JSON.parse(await this.handler.readFile(file))
      for (const [ref, truth] of Object.entries(this.truths.get(file))) {
        const { sha256, error, rawContent } = await readDisk(this.handler, `/${this.dir}/${vhds[ref]}`)
        if (sha256 !== truth || rawContent !== undefined) {
          this.fail(when, `${file}: XO reads ${error ?? sha256} ${JSON.stringify(rawContent)} instead of ${truth}`)
        }
        const { userdevice } = Object.values(vbds).find(({ VDI }) => VDI === ref)
        await this.compareExport(when, file, userdevice, truth)
        if (isVhdDifferencing[ref] !== index > 0) {
          this.fail(when, `${file}: ${JSON.stringify(isVhdDifferencing)}`)
        }
      }
    }
    await this.judgeCleaner(when)
  }

  async compareExport(when, file, userdevice, truth) {
    const time = basename(file, '.json').replace(/^(\d{4})(\d{2})(\d{2})/, '$1-$2-$3')
    const out = join(this.folder, 'export.raw')
    await this.xofs('export', this.repo, `${this.uuid}/${time}/xvd${'abc'[userdevice]}`, '--force', '-o', out)
    const { sha256 } = await sha256OfFile(out)
    if (sha256 !== truth) {
      this.fail(when, `${file}: xofs exports ${sha256} instead of ${truth}`)
    }
  }

  async judgeCleaner(when) {
    const before = await listFiles(this.repo)
    const said = []
    const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
    await this.adapter
      .cleanVm(this.dir, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log })
      .catch(error => said.push(shortError(error)))
    const after = await listFiles(this.repo)
    if (said.length !== 0 || !isDeepStrictEqual(after, before)) {
      this.fail(when, `XO's cleaner has something to do: ${said}`)
    }
  }

  async check(when) {
    const said = await this.xofs('check', this.repo, '--data')
    if (!said.includes('no damage found')) {
      this.fail(when, said)
    }
  }

  // XO's next backup, of the same records and what the machine could have written since; then its retention, and its merge
  async continueByXo(when) {
    const random = new Random(`backup ${this.name}`)
    const newest = JSON.parse(await this.handler.readFile((await this.listed()).at(-1)))
    const { jobId, scheduleId, vbds, vifs, vm, vmSnapshot } = newest
    const writer = new IncrementalRemoteWriter({
      adapter: this.adapter,
      config: CONFIG,
      healthCheckSr: undefined,
      job: { id: jobId, name: 'backup', mode: 'delta' },
      remoteId: 'interop',
      schedule: { id: scheduleId, name: 'nightly' },
      settings: { ...SETTINGS, exportRetention: RETENTION },
      vmUuid: this.uuid,
    })
    const [vdis, disks, isVhdDifferencing, digests] = [{}, {}, {}, {}]
    for (const [ref, vdi] of Object.entries(newest.vdis)) {
      const uuid = random.uuid()
      await copyFile(this.raw(vdi.uuid), this.raw(uuid))
      await writeAt(this.raw(uuid), Buffer.alloc(300_000, 0xa5), random.int(0, vdi.virtual_size / MIB - 1) * MIB)
      vdis[ref] = { ...vdi, uuid }
      disks[ref] = new RawSnapshotDisk(this.raw(uuid), { basePath: this.raw(vdi.uuid) })
      await disks[ref].init()
      isVhdDifferencing[ref] = true
      digests[ref] = (await sha256OfFile(this.raw(uuid))).sha256
    }
    const baseVdis = new Map(Object.values(newest.vdis).map(vdi => [vdi.uuid, vdi.$snapshot_of$uuid]))
    xoWarnings.length = 0
    await writer.beforeBackup()
    await writer.checkBaseVdis(baseVdis)
    if (baseVdis.size !== 2) {
      this.fail(when, `XO would put ${baseVdis.size} of 2 disks on the newest backup`)
    }
    await writer.prepare({ isFull: false })
    const timestamp = Math.max(Date.now(), newest.timestamp + 1000)
    await writer.transfer({
      deltaExport: { version: '1.1.0', disks, vbds, vdis, vifs, vm: vmSnapshot, vtpms: [] },
      includeNonNbdQcow2Fix: true,
      isVhdDifferencing,
      timestamp,
      vm,
      vmSnapshot,
    })
    await writer.cleanup()
    await writer.afterBackup()
    if (xoWarnings.length !== 0) {
      this.fail(when, `XO warns: ${JSON.stringify(xoWarnings)}`)
    }
    this.truths.set((await this.listed()).at(-1), digests)
  }
}

const KINDS = [
  { name: 'stream', args: ['--no-nbd', '--format', 'vhd'], useVhdDirectory: false, ways: ['VHD stream', 'VHD stream'] },
  { name: 'list', args: ['--compression', 'brotli'], ways: ['NBD + block list', 'NBD + block list'] },
  { name: 'cbt', args: ['--cbt', '--compression', 'none'], compression: 'none', ways: ['NBD + block list', 'NBD + CBT'] },
  { name: 'encrypted', args: ['--cbt'], encryptionKey: ENCRYPTION_KEY, ways: ['NBD + block list', 'NBD + CBT'] },
]

async function judgeIncrements({ name, ways: [whole, since], ...kind }) {
  const pool = await Pool.start([...MACHINE, '--write-every', '1', '--writes', '3', '--coalesce-every', '1'])
  try {
    const world = new World(name, pool, kind)
    await world.open()
    await world.increment(whole, 'key')
    while (world.truths.size < RETENTION) {
      await pool.write()
      await world.increment(since, `increment ${world.truths.size}`)
    }
    await world.judge(RETENTION, 'made')
    await world.continueByXo('continued by XO')
    await world.judge(RETENTION, 'continued and merged by XO')
    await world.check('continued and merged by XO')
    // The pool knows nothing of the backup that XO made: all is read, and what differs from it is stored.
    await pool.write()
    await world.increment(whole, 'after XO')
    await pool.write()
    await world.increment(since, 'after that')
    await world.judge(RETENTION + 2, 'after XO')
    await world.check('after XO')
    await world.dispose()
  } finally {
    await pool.close()
  }
}

// The digests of the disks in an XVA: pieces of 1 MiB, of which those may be left out that are zeroes, but not the last.
async function digestsOfXva(xva, folder) {
  await mkdir(folder)
  await run('tar', ['-C', folder, '-xf', xva])
  const digests = []
  for (const ref of (await readdir(folder)).filter(name => name.startsWith('Ref:'))) {
    const pieces = (await readdir(join(folder, ref))).filter(name => /^\d{8}$/.test(name)).sort()
    async function* content() {
      for (let number = 0; number <= Number(pieces.at(-1)); number++) {
        const name = String(number).padStart(8, '0')
        yield pieces.includes(name) ? await readFile(join(folder, ref, name)) : Buffer.alloc(MIB)
      }
    }
    digests.push((await sha256OfStream(content())).sha256)
  }
  await rm(folder, { recursive: true })
  return digests.sort()
}

// XO lists full backups, too, reads them, and what it reads holds the disks; nothing is written meanwhile
async function judgeFulls(compression, encryptionKey) {
  const name = `full-${compression}`
  const pool = await Pool.start(MACHINE)
  try {
    const world = new World(name, pool, { args: ['--mode', 'full', '--xva-compression', compression], encryptionKey })
    await world.open()
    const [vm] = await pool.call('VM.get_by_name_label', VM)
    const truths = []
    for (const vbd of await pool.call('VM.get_VBDs', vm)) {
      const { type, VDI } = await pool.call('VBD.get_record', vbd)
      const vdi = type === 'Disk' ? await pool.call('VDI.get_record', VDI) : undefined
      if (vdi !== undefined && !vdi.name_label.includes('[NOBAK]')) {
        const snapshot = await pool.call('VDI.snapshot', VDI)
        truths.push(await pool.export(snapshot, world.raw(vdi.uuid)))
        await pool.destroy(snapshot)
      }
    }
    const judge = async (count, when) => {
      const backups = await world.adapter.listVmBackups(world.uuid, ({ mode }) => mode === 'full')
      if (backups.length !== count) {
        world.fail(when, `XO lists ${backups.map(({ _filename }) => _filename)}`)
      }
      for (const backup of backups) {
        const xva = join(world.folder, 'read.xva')
        await pipeline(await world.adapter.readFullVmBackup(backup), createWriteStream(xva))
        const digests = await digestsOfXva(xva, join(world.folder, 'xva'))
        if (!isDeepStrictEqual(digests, truths.toSorted())) {
          world.fail(when, `${backup._filename}: XO reads an XVA with ${digests} instead of ${truths}`)
        }
        if (!(await world.adapter.isValidXva(join('/', backup._filename, '..', backup.xva)))) {
          world.fail(when, `${backup._filename}: its XVA is not valid for XO`)
        }
      }
      await world.judgeCleaner(when)
      return backups
    }
    await world.backUp()
    await world.backUp()
    const [oldest] = await judge(2, 'made')
    await world.adapter.deleteVmBackups([oldest._filename])
    await judge(1, 'forgotten by XO')
    await world.backUp()
    await judge(2, 'after XO')
    if (compression === 'none') {
      // the disks of others xofs cannot read
      await world.check('after XO')
    }
    await world.dispose()
  } finally {
    await pool.close()
  }
}

await rm(work, { recursive: true, force: true })
await mkdir(work, { recursive: true })
for (const kind of KINDS) {
  await judgeIncrements(kind)
}
await judgeFulls('none')
await judgeFulls('zstd')
await judgeFulls('gzip', ENCRYPTION_KEY)
await rm(work, { recursive: true, force: true })
console.log(`backup: ${KINDS.length} kinds and full backups judged, ${failures} failures`)
process.exit(failures === 0 ? 0 : 1)
