#!/usr/bin/env node
// Compares which backups `xofs forget` and Xen Orchestra's own retention would let go, on random times.
//
// usage: retention.mjs XOFS WORK_DIR [SEED] [ROUNDS]
//
// The backups are metadata alone: full ones, which nothing but the rules keeps.

import { execFile } from 'node:child_process'
import { mkdir, rm, writeFile } from 'node:fs/promises'
import { join, resolve } from 'node:path'
import { promisify } from 'node:util'

import { getOldEntries } from '@xen-orchestra/backups/_getOldEntries.mjs'
import { formatFilenameDate } from '@xen-orchestra/backups/_filenameDate.mjs'

import { Random } from './lib/random.mjs'

const [xofs, work] = process.argv.slice(2, 4).map(path => resolve(path))
const seed = process.argv[4] ?? String(Date.now())
const rounds = Number(process.argv[5] ?? 60)
console.log(`retention: seed ${seed}`)

const HOUR = 3600e3
const DAY = 24 * HOUR
const SCHEDULE = 'b5c1f6f0-4a0e-4f2c-8f4e-0d8f3a6e6a11'
const ZONES = ['UTC', 'Europe/Paris', 'America/New_York', 'Pacific/Apia', 'America/Sao_Paulo', 'Australia/Lord_Howe']
// Changes of a clock, the day that Samoa left out, and the turn of a year.
const MOMENTS = [
  '2011-12-30T10:00:00Z', '2018-02-18T02:00:00Z', '2018-11-04T03:00:00Z', '2024-10-27T01:00:00Z', '2025-03-30T01:00:00Z',
  '2025-03-09T07:00:00Z', '2025-11-02T06:00:00Z', '2023-01-01T00:00:00Z', '2024-12-29T00:00:00Z',
].map(Date.parse)
const STEPS = [0.3 * HOUR, 5 * HOUR, DAY, 3 * DAY, 20 * DAY]

// Distinct times, ascending: of one VM no two are in one second.
function times(random) {
  const step = random.pick(STEPS)
  const count = random.int(1, 60)
  let time = random.pick(MOMENTS) - step * random.int(0, count)
  return Array.from({ length: count }, () => (time += 1000 + random.int(0, 2 * step)))
}

async function letGo(repository, random, entries) {
  const last = random.int(0, 4)
  const longTermRetention = {}
  for (const duration of ['daily', 'weekly', 'monthly', 'yearly']) {
    if (random.chance(0.5)) {
      longTermRetention[duration] = { retention: random.int(1, 8) }
    }
  }
  if (last === 0 && Object.keys(longTermRetention).length === 0) {
    longTermRetention.daily = { retention: 1 }
  }
  const timezone = random.pick(ZONES)
  const rules = [`--keep-last=${last}`, `--timezone=${timezone}`]
  for (const [duration, { retention }] of Object.entries(longTermRetention)) {
    rules.push(`--keep-${duration}=${retention}`)
  }
  const { stdout } = await promisify(execFile)(xofs, ['forget', repository, '--all', '--json', ...rules])
  const { vms } = JSON.parse(stdout)
  const ours = vms[0].backups.filter(({ decision }) => decision === 'forget').map(({ metadata }) => metadata)
  const xo = getOldEntries(last, entries, { longTermRetention, timezone }).map(({ id }) => id)
  return { rules, ours: ours.sort(), xo: xo.sort(), found: vms[0].backups.length }
}

const random = new Random(seed)
let wrong = 0
let forgotten = 0
for (let round = 0; round < rounds; round++) {
  const repository = join(work, 'repository')
  const folder = `xo-vm-backups/${random.uuid()}`
  await mkdir(join(repository, folder), { recursive: true })
  const entries = times(random).map(timestamp => ({ timestamp, id: `${folder}/${formatFilenameDate(timestamp)}.json` }))
  for (const { timestamp, id } of entries) {
    const metadata = { jobId: 'job', mode: 'full', scheduleId: SCHEDULE, timestamp, xva: './none.xva' }
    await writeFile(join(repository, id), JSON.stringify(metadata))
  }
  const { rules, ours, xo, found } = await letGo(repository, random, entries)
  forgotten += xo.length
  if (found !== entries.length || ours.join() !== xo.join()) {
    wrong++
    const only = (these, others) => these.filter(id => !others.includes(id)).join(' ') || 'nothing'
    console.log(`round ${round}, ${rules.join(' ')}: ${found} of ${entries.length} backups are judged`)
    console.log(`  only xofs forgets ${only(ours, xo)}\n  only XO forgets ${only(xo, ours)}`)
  }
  await rm(repository, { recursive: true })
}
console.log(`retention: ${rounds - wrong} of ${rounds} rounds agree with XO, ${forgotten} backups to forget`)
process.exit(wrong === 0 && forgotten > 0 ? 0 : 1)
