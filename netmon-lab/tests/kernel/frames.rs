//! Frames, byte by byte. Checksums are left zero: the programs do not look at them.

pub const HERE4: [u8; 4] = [10, 0, 0, 1];
pub const THERE4: [u8; 4] = [192, 0, 2, 9];
pub const HERE6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub const THERE6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const ACK: u8 = 16;
pub const PSH: u8 = 8;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMP6: u8 = 58;

const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const BROADCAST: [u8; 6] = [0xff; 6];

pub fn cat(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    cat(&[&MAC_B, &MAC_A, &ethertype.to_be_bytes(), payload])
}

pub fn broadcast_frame(frame: &[u8]) -> Vec<u8> {
    cat(&[&BROADCAST, &frame[6..]])
}

/// Puts a VLAN tag behind the addresses.
pub fn tagged(tag: u16, frame: &[u8]) -> Vec<u8> {
    cat(&[&frame[..12], &tag.to_be_bytes(), &[0, 42], &frame[12..]])
}

pub fn eth4(packet: &[u8]) -> Vec<u8> {
    ethernet(0x0800, packet)
}

pub fn eth6(packet: &[u8]) -> Vec<u8> {
    ethernet(0x86dd, packet)
}

/// An IPv4 packet; `options` in multiples of four bytes, `fragment` as in the header (flags and offset).
pub fn ipv4(
    source: [u8; 4],
    destination: [u8; 4],
    protocol: u8,
    options: &[u8],
    fragment: u16,
    rest: &[u8],
) -> Vec<u8> {
    let header = 20 + options.len();
    let total = (header + rest.len()) as u16;
    cat(&[
        &[0x40 | (header / 4) as u8, 0],
        &total.to_be_bytes(),
        &[0, 7],
        &fragment.to_be_bytes(),
        &[64, protocol, 0, 0],
        &source,
        &destination,
        options,
        rest,
    ])
}

/// An IPv6 packet; `next` is the protocol of the first thing in `rest`.
pub fn ipv6(source: [u8; 16], destination: [u8; 16], next: u8, rest: &[u8]) -> Vec<u8> {
    cat(&[&[0x60, 0, 0, 0], &(rest.len() as u16).to_be_bytes(), &[next, 64], &source, &destination, rest])
}

pub fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    cat(&[&source.to_be_bytes(), &destination.to_be_bytes(), &length.to_be_bytes(), &[0, 0], payload])
}

/// `options` in multiples of four bytes.
pub fn tcp(source: u16, destination: u16, flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let offset = ((20 + options.len()) / 4) as u8;
    cat(&[
        &source.to_be_bytes(),
        &destination.to_be_bytes(),
        &[0; 8],
        &[offset << 4, flags],
        &[0; 6],
        options,
        payload,
    ])
}

/// From here to there, over Ethernet and IPv4.
pub fn udp_out(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    eth4(&ipv4(HERE4, THERE4, UDP, &[], 0, &udp(source, destination, payload)))
}

/// From there to here.
pub fn udp_in(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    eth4(&ipv4(THERE4, HERE4, UDP, &[], 0, &udp(source, destination, payload)))
}

pub fn tcp_out(flags: u8, payload: &[u8]) -> Vec<u8> {
    eth4(&ipv4(HERE4, THERE4, TCP, &[], 0, &tcp(50_000, 443, flags, &[], payload)))
}

pub fn tcp_in(flags: u8, payload: &[u8]) -> Vec<u8> {
    eth4(&ipv4(THERE4, HERE4, TCP, &[], 0, &tcp(443, 50_000, flags, &[], payload)))
}
