//! What a Mac's own Metal queue does, and what it refuses. Without a Metal GPU there is nothing to test.
#![cfg(target_vendor = "apple")]

use mtlflashattn_metal::native::{Buffer, NativeDevice, Pipeline};
use mtlflashattn_metal::{Argument, Device, DeviceError, Grid};

/// Every thread adds its list entry, scaled, to its element.
const ADD: &str = "
#include <metal_stdlib>
using namespace metal;
kernel void add(
    device float* values [[buffer(0)]],
    constant long* list [[buffer(1)]],
    constant float* factors [[buffer(2)]],
    uint i [[thread_position_in_grid]])
{
    values[i] += factors[0] * float(list[i]);
}
vertex float4 corner() { return float4(0.0f); }
";

/// Whole threadgroups of 32 threads along x.
fn line(threadgroups: u32) -> Grid {
    Grid { threadgroups: [threadgroups, 1, 1], group: [32, 1, 1] }
}

fn with_add(test: impl FnOnce(&NativeDevice, &Pipeline)) {
    if let Some(device) = NativeDevice::system_default() {
        let pipeline = device.pipeline(ADD, "add").expect("compiles");
        test(&device, &pipeline);
    }
}

fn refusal(result: Result<impl Sized, DeviceError>) -> String {
    result.err().expect("is refused").to_string()
}

/// 16 entries go through `setBytes`, 640 through a buffer; the second launch needs what the first has written.
#[test]
fn launches_run_in_order_with_lists_of_any_length() {
    with_add(|device, add| {
        for threadgroups in [1, 20] {
            let len = 32 * threadgroups as usize;
            let list: Vec<i64> = (0..len as i64).collect();
            let start: Vec<f32> = vec![0.5; len];
            let values = Buffer::from_slice(device, &start).expect("fits");
            for factor in [1.0, -2.0, 0.25] {
                let arguments = [Argument::Buffer(&values), Argument::Ints(&list), Argument::Floats(&[factor])];
                device.dispatch(add, &arguments, line(threadgroups)).expect("is launched");
            }
            let mut got = vec![f32::NAN; len];
            values.read_into(&mut got).expect("runs");
            // Multiples of 1/4 below 2^10 are exact in float32.
            let expected: Vec<f32> = list.iter().map(|&entry| 0.5 - 0.75 * entry as f32).collect();
            assert_eq!(got, expected);
        }
    });
}

#[test]
fn a_pipeline_tells_its_limits() {
    with_add(|_, add| {
        assert_eq!(add.simd_width(), 32);
        assert!((32..=1024).contains(&add.max_threads()), "{}", add.max_threads());
        assert_eq!(add.threadgroup_memory(), 0);
    });
}

#[test]
fn texts_without_a_kernel_are_refused() {
    with_add(|device, _| {
        let broken = device.pipeline("kernel void add(device flat* x [[buffer(0)]]) {}", "add");
        assert!(matches!(&broken, Err(DeviceError::Compile(log)) if log.contains("flat")), "{}", refusal(broken));
        for (entry, reason) in [("subtract", "add"), ("corner", "no kernel")] {
            let missing = device.pipeline(ADD, entry);
            assert!(matches!(missing, Err(DeviceError::Pipeline { .. })));
            assert!(refusal(missing).contains(reason));
        }
    });
}

#[test]
fn launches_that_would_end_the_process_are_refused() {
    with_add(|device, add| {
        let values = Buffer::zeroed(device, 4 * 32).expect("fits");
        let other = NativeDevice::system_default().expect("is still there");
        let foreign = Buffer::zeroed(&other, 4 * 32).expect("fits");
        let (list, factors): ([i64; 32], [f32; 1]) = ([0; 32], [1.0]);
        let dispatch = |buffer, list, grid| {
            device.dispatch(add, &[Argument::Buffer(buffer), Argument::Ints(list), Argument::Floats(&factors)], grid)
        };
        let wide = Grid { threadgroups: [1; 3], group: [u32::MAX; 3] };
        let full = Grid { threadgroups: [1; 3], group: [1024, 2, 1] };
        let empty = Grid { threadgroups: [1; 3], group: [32, 0, 1] };
        for grid in [wide, full, empty] {
            assert!(refusal(dispatch(&values, &list, grid)).contains("a threadgroup of"));
        }
        assert!(refusal(dispatch(&values, &[], line(1))).contains("argument 1 is an empty list"));
        assert!(refusal(dispatch(&foreign, &list, line(1))).contains("argument 0 is a buffer of another device"));
        let many: Vec<_> = (0..32).map(|_| Argument::Buffer(&values)).collect();
        assert!(refusal(device.dispatch(add, &many, line(1))).contains("32 arguments"));
        assert!(dispatch(&values, &list, line(0)).is_ok(), "a grid without threadgroups is done");
        device.synchronize().expect("nothing ran");
    });
}

#[test]
fn memory_has_limits_but_may_be_empty() {
    with_add(|device, _| {
        assert!(matches!(Buffer::zeroed(device, usize::MAX), Err(DeviceError::Memory(_))));
        let empty = Buffer::from_slice::<f32>(device, &[]).expect("fits");
        assert!(empty.is_empty());
        empty.read_into::<f32>(&mut []).expect("reads nothing");
    });
}

#[test]
fn threads_share_devices_pipelines_and_buffers() {
    fn shared<T: Send + Sync>() {}
    shared::<NativeDevice>();
    shared::<Pipeline>();
    shared::<Buffer>();
}
