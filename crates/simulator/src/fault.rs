//! Turns a memory fault inside of a kernel into an error of its dispatch.
//!
//! The handler knows a kernel's fault by the stack that it happened on, moves the thread to the runtime's landing,
//! and leaves every other fault to whoever handled it before.

use std::cell::Cell;
use std::ops::Range;

use crate::library::FaultFunction;

/// The dispatch that runs on a thread.
#[derive(Clone, Copy)]
struct Running {
    stacks: (usize, usize),
    landing: FaultFunction,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

/// Marks a thread as running a kernel until it is dropped.
pub struct FaultScope {
    before: Option<Running>,
}

impl FaultScope {
    /// Faults on `stacks` continue at `landing` from now on.
    pub fn enter(stacks: &Range<usize>, landing: FaultFunction) -> Self {
        platform::install();
        let running = Running { stacks: (stacks.start, stacks.end), landing };
        FaultScope { before: RUNNING.replace(Some(running)) }
    }
}

impl Drop for FaultScope {
    fn drop(&mut self) {
        RUNNING.set(self.before.take());
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod platform {
    use std::mem::MaybeUninit;
    use std::sync::Once;

    use super::RUNNING;
    use crate::library::STACK_BYTES;

    static mut PREVIOUS: [MaybeUninit<libc::sigaction>; 2] = [const { MaybeUninit::uninit() }; 2];
    const SIGNALS: [i32; 2] = [libc::SIGSEGV, libc::SIGBUS];

    pub fn install() {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(|| {
            for (index, signal) in SIGNALS.into_iter().enumerate() {
                // SAFETY: the handler obeys the rules of signal handlers, and PREVIOUS is written here only, before
                // the handler that reads it exists.
                unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = handle as *const () as usize;
                    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                    libc::sigaction(signal, &raw const action, (&raw mut PREVIOUS[index]).cast());
                }
            }
        });
        ensure_alternate_stack();
    }

    /// A fault may be an overflow of the very stack: the handler needs another one. Rust's own threads have one.
    fn ensure_alternate_stack() {
        const BYTES: usize = 64 << 10;
        // SAFETY: plain system calls; the stack is never freed, because the thread may outlive every owner.
        unsafe {
            let mut current: libc::stack_t = std::mem::zeroed();
            libc::sigaltstack(std::ptr::null(), &raw mut current);
            if current.ss_flags & libc::SS_DISABLE != 0 {
                let memory = Box::leak(vec![0_u8; BYTES].into_boxed_slice());
                let fresh = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: BYTES };
                libc::sigaltstack(&raw const fresh, std::ptr::null_mut());
            }
        }
    }

    extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        // SAFETY: the system hands valid pointers to a handler installed with SA_SIGINFO.
        let (context, address) = unsafe { (&mut *context.cast::<libc::ucontext_t>(), (*info).si_addr() as usize) };
        let stack = stack_pointer(context);
        match RUNNING.get() {
            Some(running) if (running.stacks.0..running.stacks.1).contains(&stack) => {
                // The landing starts near the top of the lane's stack, whose frames are given up; the words at the
                // very top name the lane.
                let top = stack / STACK_BYTES * STACK_BYTES + STACK_BYTES;
                land(context, top - 1024, address, running.landing as usize);
            }
            // SAFETY: `signal` is one that `install` set up, so that its predecessor is known.
            _ => unsafe { forward(signal, info, std::ptr::from_mut(context).cast()) },
        }
    }

    /// Does what would have happened without this handler.
    unsafe fn forward(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let index = usize::from(signal == SIGNALS[1]);
        // SAFETY: PREVIOUS was written before this handler was installed and is not changed afterwards; a handler's
        // type follows from its flags.
        unsafe {
            let previous = (&raw const PREVIOUS[index]).cast::<libc::sigaction>().read();
            match previous.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => {
                    libc::sigaction(signal, &raw const previous, std::ptr::null_mut());
                }
                handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(handler);
                    handler(signal, info, context);
                }
                handler => {
                    let handler: extern "C" fn(i32) = std::mem::transmute(handler);
                    handler(signal);
                }
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn stack_pointer(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.gregs[libc::REG_RSP as usize] as usize
    }

    #[cfg(target_arch = "x86_64")]
    fn land(context: &mut libc::ucontext_t, stack: usize, address: usize, landing: usize) {
        let registers = &mut context.uc_mcontext.gregs;
        registers[libc::REG_RDI as usize] = address as i64;
        registers[libc::REG_RSI as usize] = registers[libc::REG_RIP as usize];
        // A function starts 8 bytes below a multiple of 16: the return address, which the landing never uses.
        registers[libc::REG_RSP as usize] = (stack / 16 * 16 - 8) as i64;
        registers[libc::REG_RIP as usize] = landing as i64;
    }

    #[cfg(target_arch = "aarch64")]
    fn stack_pointer(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.sp as usize
    }

    #[cfg(target_arch = "aarch64")]
    fn land(context: &mut libc::ucontext_t, stack: usize, address: usize, landing: usize) {
        let machine = &mut context.uc_mcontext;
        machine.regs[0] = address as u64;
        machine.regs[1] = machine.pc;
        machine.sp = (stack / 16 * 16) as u64;
        machine.pc = landing as u64;
    }
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod platform {
    /// Elsewhere a fault of a kernel ends the program; the check layer finds it before it happens.
    pub fn install() {}
}
