// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest keeps beside its disks: a number in an EFI variable and in its TPM.
//!
//! Compiled as a program of its own for the guest (`guest-secrets`), so it needs the standard library alone and
//! talks to the TPM in its own language. The commands are those of the specification "TPM 2.0 Library", part 3.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::process::ExitCode;

const DEVICE: &str = "/dev/tpm0";
const VARIABLES: &str = "/sys/firmware/efi/efivars";
/// Variables of this name and a number belong to the tests alone. Each number has its own, because the kernel
/// protects those that it does not know from changes.
const NAME: &str = "VzdumpTest";
const VENDOR: &str = "6c2f7a1e-9b0d-4d1f-8a35-0c5f1be2d7a4";
/// Non-volatile, and for the boot loader and the running system.
const VARIABLE_ATTRIBUTES: u32 = 7;
/// The place in the TPM, among those for the owner's use.
const INDEX: u32 = 0x0150_0001;
/// How much is kept there.
const DATA_BYTES: u16 = 8;
/// Read and written by the owner and by whoever knows the index' password, which is empty; wrong ones lock
/// nothing.
const INDEX_ATTRIBUTES: u32 = 1 << 1 | 1 << 2 | 1 << 17 | 1 << 18 | 1 << 25;
const OWNER: u32 = 0x4000_0001;
const SHA256: u16 = 0x000b;
const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
const NV_DEFINE_SPACE: u32 = 0x012a;
const NV_WRITE: u32 = 0x0137;
const NV_READ: u32 = 0x014e;
const PCR_READ: u32 = 0x017e;
/// The place is there already.
const NV_DEFINED: u32 = 0x014c;
/// There is nothing at the place.
const HANDLE_UNKNOWN: u32 = 0x018b;
const NV_UNINITIALIZED: u32 = 0x014a;
const HEADER_BYTES: usize = 10;
const ANSWER_BYTES_MAX: usize = 4096;

/// Runs `guest-secrets write NUMBER` or `guest-secrets read`.
#[must_use]
pub fn run(arguments: &[String]) -> ExitCode {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = match words.as_slice() {
        ["write", number] => match number.parse() {
            Ok(number) => write(number).map(|()| format!("WRITTEN {number}")),
            Err(_) => Err(format!("'{number}' is no number")),
        },
        ["read"] => read(),
        _ => Err("write NUMBER or read".to_owned()),
    };
    let (line, code) = match said {
        Ok(line) => (format!("SECRETS {line}"), ExitCode::SUCCESS),
        Err(why) => (format!("ERROR secrets: {why}"), ExitCode::FAILURE),
    };
    let mut stdout = std::io::stdout();
    let written = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    if written.is_ok() { code } else { ExitCode::FAILURE }
}

fn write(number: u64) -> Result<(), String> {
    let mut variable = VARIABLE_ATTRIBUTES.to_le_bytes().to_vec();
    variable.extend(number.to_be_bytes());
    // In one call: each is a change of its own of the firmware's store.
    let path = format!("{VARIABLES}/{NAME}{number}-{VENDOR}");
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    file.and_then(|mut file| file.write_all(&variable))
        .map_err(|error| format!("the EFI variable is not written: {error}"))?;
    let mut tpm = Tpm::open()?;
    tpm.define()?;
    tpm.store(number)
}

fn read() -> Result<String, String> {
    let variable = last_variable()?.map_or("none".to_owned(), |number| number.to_string());
    let mut tpm = Tpm::open()?;
    let index = tpm.load()?;
    let register: String = tpm.register(0)?.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("efi={variable} tpm={index} pcr0={register}"))
}

/// The highest number that has a variable, which must be what is in it.
fn last_variable() -> Result<Option<u64>, String> {
    let words = |error: std::io::Error| format!("the EFI variables are not read: {error}");
    let mut last = None;
    for entry in std::fs::read_dir(VARIABLES).map_err(words)? {
        let entry = entry.map_err(words)?;
        let Some(number) = number_of(&entry.file_name().to_string_lossy()) else { continue };
        let content = std::fs::read(entry.path()).map_err(words)?;
        if number_in(content.get(4..)) != Some(number.to_string()) {
            return Err(format!("the EFI variable {number} has an odd content"));
        }
        last = last.max(Some(number));
    }
    Ok(last)
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix(NAME)?.strip_suffix(VENDOR)?.strip_suffix('-')?.parse().ok()
}

fn number_in(bytes: Option<&[u8]>) -> Option<String> {
    let bytes: [u8; 8] = bytes?.try_into().ok()?;
    Some(u64::from_be_bytes(bytes).to_string())
}

struct Tpm {
    device: File,
}

/// The answer to a command.
struct Answer {
    code: u32,
    body: Vec<u8>,
}

impl Tpm {
    fn open() -> Result<Self, String> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE);
        device.map(|device| Self { device }).map_err(|error| format!("{DEVICE}: {error}"))
    }

    fn run(&mut self, command: &[u8]) -> Result<Answer, String> {
        let mut answer = vec![0; ANSWER_BYTES_MAX];
        let exchange = self.device.write_all(command).and_then(|()| self.device.read(&mut answer));
        let length = exchange.map_err(|error| format!("the TPM does not answer: {error}"))?;
        answer.truncate(length);
        let code = answer.get(6..HEADER_BYTES).and_then(|bytes| bytes.try_into().ok());
        let code = code.map(u32::from_be_bytes).ok_or("the TPM's answer is too short")?;
        Ok(Answer { code, body: answer.split_off(HEADER_BYTES) })
    }

    fn define(&mut self) -> Result<(), String> {
        let mut place = INDEX.to_be_bytes().to_vec();
        place.extend(SHA256.to_be_bytes());
        place.extend(INDEX_ATTRIBUTES.to_be_bytes());
        place.extend(0_u16.to_be_bytes());
        place.extend(DATA_BYTES.to_be_bytes());
        let mut parameters = 0_u16.to_be_bytes().to_vec();
        parameters.extend(sized(&place));
        let answer = self.run(&command(NV_DEFINE_SPACE, &[OWNER], &parameters))?;
        match answer.code {
            0 | NV_DEFINED => Ok(()),
            code => Err(format!("the TPM makes no room: {code:#x}")),
        }
    }

    fn store(&mut self, number: u64) -> Result<(), String> {
        let mut parameters = sized(&number.to_be_bytes());
        parameters.extend(0_u16.to_be_bytes());
        let answer = self.run(&command(NV_WRITE, &[OWNER, INDEX], &parameters))?;
        if answer.code == 0 { Ok(()) } else { Err(format!("not stored: {:#x}", answer.code)) }
    }

    fn load(&mut self) -> Result<String, String> {
        let parameters = [DATA_BYTES.to_be_bytes(), 0_u16.to_be_bytes()].concat();
        let answer = self.run(&command(NV_READ, &[OWNER, INDEX], &parameters))?;
        match answer.code {
            // The length of all parameters and that of the data come before it.
            0 => {
                let data = answer.body.get(6..6 + usize::from(DATA_BYTES));
                number_in(data).ok_or_else(|| "the TPM's data is too short".to_owned())
            }
            // The lowest bits of the first say which handle is meant.
            code if code & !0xf00 == HANDLE_UNKNOWN & !0xf00 => Ok("none".to_owned()),
            NV_UNINITIALIZED => Ok("none".to_owned()),
            code => Err(format!("the TPM gives no data: {code:#x}")),
        }
    }

    fn register(&mut self, number: u8) -> Result<Vec<u8>, String> {
        let mut parameters = 1_u32.to_be_bytes().to_vec();
        parameters.extend(SHA256.to_be_bytes());
        parameters.extend([3, 1 << number, 0, 0]);
        let answer = self.run(&command(PCR_READ, &[], &parameters))?;
        if answer.code != 0 {
            return Err(format!("the TPM gives no register: {:#x}", answer.code));
        }
        // After a counter, the selection again, and how many there are: its length, and it.
        answer.body.get(20..52).map(<[u8]>::to_vec).ok_or_else(|| "no register".to_owned())
    }
}

/// With its length in front of it.
fn sized(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}

/// A command for these handles, the first of which is authorized by an empty password.
fn command(code: u32, handles: &[u32], parameters: &[u8]) -> Vec<u8> {
    let mut body: Vec<u8> = handles.iter().flat_map(|handle| handle.to_be_bytes()).collect();
    let tag = if handles.is_empty() {
        NO_SESSIONS
    } else {
        // A password, no nonce, no attributes, and nothing as the password.
        body.extend(9_u32.to_be_bytes());
        body.extend(0x4000_0009_u32.to_be_bytes());
        body.extend([0; 5]);
        SESSIONS
    };
    body.extend_from_slice(parameters);
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut command = tag.to_be_bytes().to_vec();
    command.extend(length.to_be_bytes());
    command.extend(code.to_be_bytes());
    command.extend(body);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_laid_out_as_the_specification_says() {
        let read = command(PCR_READ, &[], &[0, 0, 0, 1, 0, 11, 3, 1, 0, 0]);
        assert_eq!(
            read,
            [0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1, 0, 11, 3, 1, 0, 0],
            "{read:x?}"
        );
        let write = command(NV_WRITE, &[OWNER, INDEX], &sized(&[7]));
        assert_eq!(write.len(), 10 + 8 + 13 + 3);
        assert_eq!(write[2..6], 34_u32.to_be_bytes());
        assert_eq!(write[18..22], 9_u32.to_be_bytes());
    }

    #[test]
    fn variables_of_others_are_none_of_ours() {
        assert_eq!(number_of(&format!("{NAME}12-{VENDOR}")), Some(12));
        for other in [format!("{NAME}-{VENDOR}"), format!("Boot0001-{VENDOR}"), NAME.to_owned()] {
            assert_eq!(number_of(&other), None, "{other}");
        }
    }

    #[test]
    fn a_number_has_eight_bytes() {
        assert_eq!(number_in(Some(&7_u64.to_be_bytes())).as_deref(), Some("7"));
        assert_eq!(number_in(Some(&[1])), None);
        assert_eq!(number_in(None), None);
    }
}
