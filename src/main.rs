//! The command `xofs`; everything stands in [`xofs::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    xofs::cli::main()
}
