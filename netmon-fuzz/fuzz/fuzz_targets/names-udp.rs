#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| netmon_fuzz::names::udp(data));
