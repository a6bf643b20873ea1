#!/usr/bin/env node
// Xen Orchestra judges what a week of nights has left (`tests/unattended`): it lists exactly the backups that are said, reads every
// disk of them as it was, finds their XVAs valid, and its cleaner has nothing to do or to say.
//
// usage: week.mjs TRUTHS      a JSON file: repository → uuid of a VM → metadata → name of a disk (xvda) → file of what it held

import { readFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'

import { listFiles, sha256OfFile } from './lib/files.mjs'
import { openRemote, RemoteAdapter } from './lib/xo.mjs'
import { readDisk, shortError } from './lib/xo-read.mjs'

let failures = 0
let disks = 0
const fail = message => {
  failures++
  console.log(`week: ${message}`)
}

async function judgeDisks(handler, dir, file, { vbds, vhds }, truths) {
  const names = []
  for (const [ref, vhd] of Object.entries(vhds)) {
    const { userdevice } = Object.values(vbds).find(({ VDI }) => VDI === ref)
    const name = `xvd${'abcdefgh'[userdevice]}`
    names.push(name)
    const { sha256: truth } = await sha256OfFile(truths[name])
    const { sha256, error, rawContent } = await readDisk(handler, `/${dir}/${vhd}`)
    disks++
    if (sha256 !== truth || rawContent !== undefined) {
      fail(`${file} ${name}: XO reads ${error ?? sha256} ${JSON.stringify(rawContent)} instead of ${truth}`)
    }
  }
  if (!isDeepStrictEqual(names.sort(), Object.keys(truths).sort())) {
    fail(`${file}: XO has the disks ${names}`)
  }
}

async function judge(repository, vms) {
  const { handler, dispose } = await openRemote(repository)
  const adapter = new RemoteAdapter(handler, { dirMode: 0o700 })
  for (const [vm, truths] of Object.entries(vms)) {
    const dir = `xo-vm-backups/${vm}`
    const listed = await adapter.listVmBackups(vm)
    const files = listed.map(({ _filename }) => _filename.replace(/^\//, '')).sort()
    if (!isDeepStrictEqual(files, Object.keys(truths).sort())) {
      fail(`${vm}: XO lists ${files} instead of ${Object.keys(truths)}`)
    }
    for (const file of files.filter(file => file in truths)) {
      const metadata = JSON.parse(await handler.readFile(file))
      if (metadata.mode === 'delta') {
        await judgeDisks(handler, dir, file, metadata, truths[file])
      } else if (!(await adapter.isValidXva(join('/', dir, metadata.xva)))) {
        fail(`${file}: its XVA is not valid for XO`)
      }
    }
    const before = await listFiles(repository)
    const said = []
    const log = (message, data) => said.push(`${message} ${JSON.stringify(data ?? {})}`)
    await adapter
      .cleanVm(dir, { remove: true, merge: true, lock: false, logInfo: log, logWarn: log })
      .catch(error => said.push(shortError(error)))
    if (said.length !== 0 || !isDeepStrictEqual(await listFiles(repository), before)) {
      fail(`${basename(repository)}/${dir}: XO's cleaner has something to do: ${said}`)
    }
  }
  await dispose()
}

const truths = JSON.parse(await readFile(process.argv[2]))
let backups = 0
for (const [repository, vms] of Object.entries(truths)) {
  backups += Object.values(vms).reduce((sum, files) => sum + Object.keys(files).length, 0)
  await judge(repository, vms)
}
console.log(`XO judged ${backups} backups, ${disks} disks, ${failures} failures`)
process.exit(failures === 0 ? 0 : 1)
