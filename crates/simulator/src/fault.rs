//! Turns a memory fault inside of a kernel, or a kernel that does not end, into an error of its dispatch.
//!
//! The handler knows a kernel's fault by the stack that it happened on, moves the thread to the runtime's landing,
//! and leaves every other signal to whoever handled it before.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use mtlflashattn_metal::DeviceError;

use crate::library::{FaultFunction, KernelLibrary};

/// The dispatch that runs on a thread.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "faults are caught on Linux only"))]
#[derive(Clone, Copy)]
struct Running {
    stacks: (usize, usize),
    library: (usize, usize),
    landing: FaultFunction,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

/// Marks a thread as running a kernel until it is dropped.
pub struct FaultScope {
    before: Option<Running>,
    _timer: Option<platform::Timer>,
}

impl FaultScope {
    /// Faults on `stacks` continue at the library's landing from now on, and so does a kernel at its time limit.
    pub fn enter(
        stacks: &Range<usize>,
        library: &KernelLibrary,
        time_limit: Option<Duration>,
    ) -> Result<Self, DeviceError> {
        platform::install();
        let code = library.range();
        let running = Running {
            stacks: (stacks.start, stacks.end),
            library: (code.start, code.end),
            landing: library.fault_function(),
        };
        let before = RUNNING.replace(Some(running));
        Ok(FaultScope { before, _timer: time_limit.map(platform::Timer::start).transpose()? })
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
    use std::time::Duration;

    use mtlflashattn_metal::DeviceError;

    use super::RUNNING;
    use crate::library::{STACK_BYTES, TIME_IS_UP};

    static mut PREVIOUS: [MaybeUninit<libc::sigaction>; 3] = [const { MaybeUninit::uninit() }; 3];
    const SIGNALS: [i32; 3] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGVTALRM];
    /// What a timer of this module sends along: an address that nobody else has.
    static MARK: u8 = 0;

    /// Interrupts the thread that made it, once its processor time is up and then again and again.
    pub struct Timer(libc::timer_t);

    impl Timer {
        pub fn start(limit: Duration) -> Result<Self, DeviceError> {
            let failed = || DeviceError::Memory(format!("a timer: {}", std::io::Error::last_os_error()));
            let time = |duration: Duration| libc::timespec {
                tv_sec: duration.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(duration.subsec_nanos()),
            };
            let setting = libc::itimerspec {
                it_value: time(limit.max(Duration::from_millis(1))),
                it_interval: time(Duration::from_millis(5)),
            };
            // SAFETY: all structures are live and initialised, and the timer is used only after it was made.
            unsafe {
                let mut event: libc::sigevent = std::mem::zeroed();
                event.sigev_notify = libc::SIGEV_THREAD_ID;
                event.sigev_signo = libc::SIGVTALRM;
                event.sigev_value.sival_ptr = (&raw const MARK).cast_mut().cast();
                event.sigev_notify_thread_id = libc::gettid();
                let mut timer = MaybeUninit::uninit();
                if libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut event, timer.as_mut_ptr()) != 0 {
                    return Err(failed());
                }
                let timer = Timer(timer.assume_init());
                match libc::timer_settime(timer.0, 0, &raw const setting, std::ptr::null_mut()) {
                    0 => Ok(timer),
                    _ => Err(failed()),
                }
            }
        }
    }

    impl Drop for Timer {
        fn drop(&mut self) {
            // SAFETY: the timer was made by timer_create and is deleted once.
            unsafe { libc::timer_delete(self.0) };
        }
    }

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
        let (machine, info_ref) = unsafe { (&mut *context.cast::<libc::ucontext_t>(), &*info) };
        // SAFETY: signals of timers carry a value, and other senders' values are only compared.
        let is_timer = signal == libc::SIGVTALRM
            && unsafe { info_ref.si_value() }.sival_ptr == (&raw const MARK).cast_mut().cast();
        let stack = stack_pointer(machine);
        match RUNNING.get() {
            Some(running) if (running.stacks.0..running.stacks.1).contains(&stack) => {
                // The landing starts near the top of the lane's stack, whose frames are given up; the words at the
                // very top name the lane.
                let top = stack / STACK_BYTES * STACK_BYTES + STACK_BYTES - 1024;
                let landing = running.landing as usize;
                if !is_timer {
                    // SAFETY: a memory fault has an address.
                    land(machine, top, unsafe { info_ref.si_addr() } as usize, landing);
                } else if (running.library.0..running.library.1).contains(&instruction(machine)) {
                    // Not inside of the C library, which may hold a lock; the timer comes again.
                    land(machine, top, TIME_IS_UP, landing);
                }
            }
            _ if is_timer => {}
            // SAFETY: `signal` is one that `install` set up, so that its predecessor is known.
            _ => unsafe { forward(signal, info, context) },
        }
    }

    /// Does what would have happened without this handler.
    unsafe fn forward(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
        let index = SIGNALS.iter().position(|&known| known == signal).unwrap_or(0);
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
    fn instruction(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.gregs[libc::REG_RIP as usize] as usize
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
    fn instruction(context: &libc::ucontext_t) -> usize {
        context.uc_mcontext.pc as usize
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
    use std::time::Duration;

    use mtlflashattn_metal::DeviceError;

    /// Elsewhere a fault of a kernel ends the program; the check layer finds it before it happens.
    pub fn install() {}

    /// Elsewhere nothing interrupts a kernel.
    pub struct Timer;

    impl Timer {
        #[expect(clippy::unnecessary_wraps, reason = "the signature is that of the other platform")]
        pub fn start(_limit: Duration) -> Result<Self, DeviceError> {
            Ok(Timer)
        }
    }
}
