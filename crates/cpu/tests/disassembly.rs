//! The machine code of the hot loops: an accumulator that the compiler moves to the stack costs half of the speed, and
//! no other test shows it.
//!
//! `OBJDUMP` names the disassembler (GNU binutils, for the architecture of this test); without it, `objdump`.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::collections::HashMap;
use std::env;
use std::hint::black_box;
use std::process::Command;

/// A loop with fewer fused multiply-adds is not one of the products.
const HOT: usize = 12;
/// For each of three dtypes: scores and values of the forward pass; of the backward pass scores twice, values, and the
/// sums over rows twice.
const PRODUCTS: usize = 21;

struct Instruction<'a> {
    address: u64,
    /// Mnemonic and operands; x86 in Intel syntax.
    text: &'a str,
}

impl Instruction<'_> {
    fn mnemonic(&self) -> &str {
        self.text.split_whitespace().next().unwrap_or_default()
    }

    fn operands(&self) -> &str {
        self.text[self.mnemonic().len()..].trim_start()
    }

    fn is_multiply_add(&self) -> bool {
        ["vfmadd", "vfnmadd", "fmla", "fmls"].iter().any(|prefix| self.mnemonic().starts_with(prefix))
    }

    /// Vector arithmetic that a product does not contain but an elementwise function does.
    fn is_elementwise(&self) -> bool {
        const ARITHMETIC: [&str; 12] =
            ["vadd", "vsub", "vmul", "vdiv", "vmax", "vmin", "fadd", "fsub", "fmul", "fdiv", "fmax", "fmin"];
        ARITHMETIC.iter().any(|prefix| self.mnemonic().starts_with(prefix))
    }

    fn is_jump(&self) -> bool {
        let mnemonic = self.mnemonic();
        match env::consts::ARCH {
            "x86_64" => mnemonic.starts_with('j'),
            _ => ["b", "br", "cbz", "cbnz", "tbz", "tbnz"].contains(&mnemonic) || mnemonic.starts_with("b."),
        }
    }

    /// Where a direct jump goes: `jne 1a2b <name+0x10>`, `tbz w0, #3, 1a2b <name+0x10>`.
    fn jump_target(&self) -> Option<u64> {
        let operands = self.operands().split(" <").next()?;
        let target = operands.rsplit([',', ' ']).next()?;
        if self.is_jump() { u64::from_str_radix(target, 16).ok() } else { None }
    }

    /// Whether an operand is memory at one of the `registers`.
    fn has_memory_at(&self, registers: &[&str]) -> bool {
        self.operands().split('[').skip(1).any(|address| {
            let address = address.split(']').next().unwrap_or_default();
            address.split(['+', '-', '*', ',', ' ']).any(|part| registers.contains(&part))
        })
    }

    fn is_store(&self) -> bool {
        match env::consts::ARCH {
            "x86_64" => self.operands().split(',').next().is_some_and(|destination| destination.contains('[')),
            _ => self.mnemonic().starts_with("st"),
        }
    }
}

struct Function<'a> {
    name: &'a str,
    instructions: Vec<Instruction<'a>>,
}

impl<'a> Function<'a> {
    /// The functions of an `objdump --disassemble` listing.
    fn of(listing: &'a str) -> Vec<Self> {
        let mut functions: Vec<Self> = Vec::new();
        for line in listing.lines() {
            if let Some(name) = line.strip_suffix(">:").and_then(|line| line.split_once('<')) {
                functions.push(Self { name: name.1, instructions: Vec::new() });
            } else if let Some((address, text)) = line.trim_start().split_once(":\t")
                && let Ok(address) = u64::from_str_radix(address, 16)
                && let Some(function) = functions.last_mut()
            {
                function.instructions.push(Instruction { address, text: text.trim() });
            }
        }
        functions
    }

    /// The registers that point to the stack. The frame pointer is a general register where no frame is set up.
    fn stack_registers(&self) -> Vec<&'static str> {
        let sets_frame = |texts: &[&str]| {
            let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            self.instructions.iter().any(|i| texts.iter().any(|text| squeezed(i.text).starts_with(text)))
        };
        let (stack, frame, frame_set) = match env::consts::ARCH {
            "x86_64" => ("rsp", "rbp", sets_frame(&["mov rbp,rsp", "lea rbp,[rsp"])),
            _ => ("sp", "x29", sets_frame(&["mov x29, sp", "add x29, sp"])),
        };
        if frame_set { vec![stack, frame] } else { vec![stack] }
    }

    /// The bodies between a backward jump and its target that contain no other jump.
    fn innermost_loops(&self) -> Vec<&[Instruction<'a>]> {
        let index: HashMap<u64, usize> = self.instructions.iter().enumerate().map(|(i, at)| (at.address, i)).collect();
        let mut loops = Vec::new();
        let mut last_jump = None;
        for (end, instruction) in self.instructions.iter().enumerate() {
            if !instruction.is_jump() {
                continue;
            }
            if let Some(&start) = instruction.jump_target().and_then(|target| index.get(&target))
                && start <= end
                && last_jump.is_none_or(|jump| jump < start)
            {
                loops.push(&self.instructions[start..=end]);
            }
            last_jump = Some(end);
        }
        loops
    }
}

/// A hot loop in one of the vector instruction sets.
struct HotLoop<'a> {
    isa: &'static str,
    /// A matrix product, not an elementwise function.
    product: bool,
    /// What it does on the stack and should not.
    stack_traffic: Vec<String>,
    listing: String,
    function: &'a str,
}

fn hot_loops<'a>(functions: &[Function<'a>]) -> Vec<HotLoop<'a>> {
    let mut hot = Vec::new();
    for function in functions {
        let stack = function.stack_registers();
        for body in function.innermost_loops() {
            if body.iter().filter(|i| i.is_multiply_add()).count() < HOT {
                continue;
            }
            let uses = |register: &str| body.iter().any(|i| i.is_multiply_add() && i.operands().contains(register));
            let isa = match env::consts::ARCH {
                "x86_64" if uses("zmm") => "avx512",
                "x86_64" if uses("ymm") => "avx2",
                "aarch64" if uses(".4s") => "neon",
                _ => continue,
            };
            let product = !body.iter().any(Instruction::is_elementwise);
            // An elementwise loop may read constants from the stack as well as from anywhere else.
            let traffic = body.iter().filter(|i| i.has_memory_at(&stack) && (product || i.is_store()));
            hot.push(HotLoop {
                isa,
                product,
                stack_traffic: traffic.map(|i| i.text.to_owned()).collect(),
                listing: body.iter().map(|i| i.text).collect::<Vec<_>>().join("\n"),
                function: function.name,
            });
        }
    }
    hot
}

fn disassembly_of_this_test() -> String {
    let objdump = env::var("OBJDUMP").unwrap_or_else(|_| "objdump".into());
    let mut command = Command::new(&objdump);
    command.args(["--disassemble", "--no-show-raw-insn", "--wide"]);
    if env::consts::ARCH == "x86_64" {
        command.args(["--disassembler-options", "intel"]);
    }
    let output = command
        .arg(env::current_exe().expect("a test has an executable"))
        .output()
        .unwrap_or_else(|error| panic!("{objdump} (install binutils, or set OBJDUMP): {error}"));
    assert!(output.status.success(), "{objdump}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("a listing in UTF-8")
}

/// How many products must be found: those of full tiles, which are assembly in every build. Debug assertions put jumps
/// into all other loops, so that only a release build shows what the compiler makes of partly filled tiles.
const EXPECTED: &[(&str, usize)] =
    if cfg!(target_arch = "x86_64") { &[("avx2", PRODUCTS), ("avx512", PRODUCTS)] } else { &[("neon", PRODUCTS)] };

#[test]
#[allow(clippy::print_stdout, reason = "says what was examined")]
fn hot_loops_stay_in_registers() {
    // Puts the engine into this executable.
    black_box((mtlflashattn_cpu::forward as *const (), mtlflashattn_cpu::backward as *const ()));
    let listing = disassembly_of_this_test();
    let functions = Function::of(&listing);
    // A closure that is not inlined lacks the instruction set of the code around it, and calls these.
    let calls: Vec<&str> = functions.iter().map(|function| function.name).filter(|name| is_intrinsic(name)).collect();
    assert!(calls.is_empty() || cfg!(debug_assertions), "vector instructions are calls: {calls:#?}");
    let loops = hot_loops(&functions);
    for &(isa, expected) in EXPECTED {
        let found = loops.iter().filter(|l| l.isa == isa && l.product).count();
        println!(
            "{isa}: {found} products, {} elementwise loops",
            loops.iter().filter(|l| l.isa == isa).count() - found
        );
        assert!(found >= expected, "{found} products with {isa}, of at least {expected}");
    }
    for HotLoop { isa, stack_traffic, listing, function, .. } in &loops {
        assert!(stack_traffic.is_empty(), "{isa} loop in {function}: {stack_traffic:#?}\nin\n{listing}");
    }
}

/// Whether a function of this name is a single vector instruction.
fn is_intrinsic(name: &str) -> bool {
    name.contains("core_arch") && ["_mm", "neon"].iter().any(|part| name.contains(part))
}

/// A listing with one loop of `multiply_adds` and of the `other` instruction, in a function that starts with `first`.
fn sample(first: &str, multiply_adds: usize, other: &str) -> String {
    let (multiply_add, jump) = match env::consts::ARCH {
        "x86_64" => ("vfmadd231ps ymm0,ymm15,ymm12", "jne    1004 <kernel+0x4>"),
        _ => ("fmla\tv0.4s, v1.4s, v2.s[0]", "b.ne\t1004 <kernel+0x4>  // b.any"),
    };
    let mut lines = vec!["0000000000001000 <kernel>:".to_owned(), format!("    1000:\t{first}")];
    let body = std::iter::repeat_n(multiply_add, multiply_adds).chain([other, jump]);
    lines.extend(body.enumerate().map(|(i, text)| format!("    {:x}:\t{text}", 0x1004 + 4 * i)));
    lines.join("\n")
}

/// Whether the sample's loop is found, and whether its stack traffic is.
fn examine(listing: &str) -> (usize, usize) {
    let loops = hot_loops(&Function::of(listing));
    (loops.len(), loops.iter().map(|l| l.stack_traffic.len()).sum())
}

#[test]
fn stack_traffic_is_recognised() {
    let (harmless, spill, constant, division, frame, frame_slot) = match env::consts::ARCH {
        "x86_64" => (
            "vmovaps ymm12,YMMWORD PTR [rax+rdx*1]",
            "vmovups YMMWORD PTR [rsp+0x20],ymm0",
            "vmovups ymm12,YMMWORD PTR [rsp+0x20]",
            "vdivps ymm1,ymm1,YMMWORD PTR [rsp+0x20]",
            "mov    rbp,rsp",
            "vmovups ymm12,YMMWORD PTR [rbp-0x40]",
        ),
        _ => (
            "ldr\tq1, [x0, x1]",
            "str\tq0, [sp, #32]",
            "ldr\tq1, [sp, #32]",
            "fdiv\tv1.4s, v1.4s, v2.4s",
            "mov\tx29, sp",
            "ldr\tq1, [x29, #64]",
        ),
    };
    assert_eq!(examine(&sample("nop", HOT, harmless)), (1, 0));
    assert_eq!(examine(&sample("nop", HOT, spill)), (1, 1));
    assert_eq!(examine(&sample("nop", HOT, constant)), (1, 1));
    assert_eq!(examine(&sample("nop", HOT, division)), (1, 0), "an elementwise loop may read constants");
    assert_eq!(examine(&sample("nop", HOT, &format!("{division}\n    1ffc:\t{spill}"))), (1, 1), "but store nothing");
    assert_eq!(examine(&sample(frame, HOT, frame_slot)), (1, 1));
    assert_eq!(examine(&sample("nop", HOT, frame_slot)), (1, 0), "without a frame it is a general register");
    assert_eq!(examine(&sample("nop", HOT - 1, spill)), (0, 0), "too little to be a product");
    let inner_jump =
        if env::consts::ARCH == "x86_64" { "je     1004 <kernel+0x4>" } else { "cbz\tx0, 1004 <kernel+0x4>" };
    assert_eq!(examine(&sample("nop", HOT, inner_jump)), (1, 0), "the inner loop of two");
}
