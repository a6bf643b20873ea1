// A virtual disk as a raw image, filled with text at given blocks of 2 MiB, which
// changes from one backup to the next.

import { join } from 'node:path'
import { open, rm, truncate } from 'node:fs/promises'

import { copySparse, createSparse, MIB, writeAt } from './files.mjs'

export class PatternDisk {
  #blocks
  #fill
  #image
  #random

  constructor({ name, workDir, random, size, blocks = [0], fill = 2 * MIB }) {
    this.name = name
    this.size = size
    this.#blocks = blocks
    this.#fill = fill
    this.#image = join(workDir, `${name}.raw`)
    this.#random = random
  }

  async #writeBlock(index, length = this.#fill) {
    const position = index * 2 * MIB
    const data = this.#random.text(Math.min(length, this.size - position))
    await writeAt(this.#image, data, position)
  }

  async create() {
    await createSparse(this.#image, this.size)
    for (const index of this.#blocks) {
      await this.#writeBlock(index)
    }
  }

  // write: blocks to write into (again); zero: blocks which become all zeros
  async change({ write = [], zero = [], length } = {}) {
    for (const index of write) {
      await this.#writeBlock(index, length)
    }
    for (const index of zero) {
      const position = index * 2 * MIB
      await writeAt(this.#image, Buffer.alloc(Math.min(2 * MIB, this.size - position)), position)
    }
  }

  async grow(size) {
    await truncate(this.#image, size)
    this.size = size
  }

  async snapshot(path) {
    await copySparse(this.#image, path)
  }

  async describe() {
    return undefined
  }

  async dispose() {
    await rm(this.#image, { force: true })
  }
}

// indexes of the 2 MiB blocks which differ between two raw images, or which are
// not all zeros if there is no base
export async function listChangedBlocks(path, basePath, blockSize = 2 * MIB) {
  const file = await open(path)
  const base = basePath === undefined ? undefined : await open(basePath)
  try {
    const { size } = await file.stat()
    const data = Buffer.alloc(blockSize)
    const reference = Buffer.alloc(blockSize)
    const changed = []
    for (let index = 0; index * blockSize < size; index++) {
      data.fill(0)
      reference.fill(0)
      await file.read(data, 0, blockSize, index * blockSize)
      await base?.read(reference, 0, blockSize, index * blockSize)
      if (!data.equals(reference)) {
        changed.push(index)
      }
    }
    return changed
  } finally {
    await file.close()
    await base?.close()
  }
}
