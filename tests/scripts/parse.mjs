// Parse modules without running them: node --experimental-vm-modules parse.mjs FILE...

import { readFileSync } from "node:fs";
import { SourceTextModule } from "node:vm";

for (const file of process.argv.slice(2)) {
  try {
    new SourceTextModule(readFileSync(file, "utf8"), { identifier: file });
  } catch (error) {
    console.error(error.stack.split("\n    at ")[0]);
    console.log(`${file} does not parse`);
    process.exit(1);
  }
}
