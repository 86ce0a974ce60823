#![no_main]

// The clock stands still and jumps when nothing is left to do: timeouts and the tarpit cost no time.
libfuzzer_sys::fuzz_target!(|data: &[u8]| tenantry_fuzz::accept(data, |runtime| {
    runtime.start_paused(true);
}));
