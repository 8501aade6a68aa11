//! The host of an HTTP/1 request.

use netmon_common::raw::Raw;

use super::Read;
use super::host::{authority, is_address};

/// Most header fields of a request that is read to its end; servers refuse fewer.
const MOST_FIELDS: usize = 128;

/// RFC 9110, section 9; RFC 4918, section 9; RFC 3253; RFC 4791; RFC 5323; RFC 5789.
const METHODS: [&[u8]; 20] = [
    b"GET ",
    b"POST ",
    b"HEAD ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
    b"PROPFIND ",
    b"PROPPATCH ",
    b"MKCOL ",
    b"COPY ",
    b"MOVE ",
    b"LOCK ",
    b"UNLOCK ",
    b"REPORT ",
    b"SEARCH ",
    b"MKCALENDAR ",
    b"CHECKOUT ",
];

/// What a request says that tells whom it is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The host, if it has a name.
    pub name: Option<Raw>,
    /// It asks a proxy for a tunnel (RFC 9110, section 9.3.6): what follows may be anything.
    pub is_tunnel: bool,
}

/// True when a request begins like this.
pub(super) fn is_request(bytes: &[u8]) -> bool {
    METHODS.iter().any(|method| bytes.starts_with(method))
}

/// True while what there is could become a request.
pub(super) fn may_be_request(bytes: &[u8]) -> bool {
    METHODS.iter().any(|method| method.starts_with(bytes))
}

/// A request, of which there is the beginning.
pub(super) fn in_request(bytes: &[u8]) -> Read<Request> {
    match parse(bytes) {
        Ok(Some(request)) => Read::Done(request),
        // A Host that stands in what came already is as good: fields so far, as if there were no more of them.
        Ok(None) => {
            let lines = bytes.windows(2).rposition(|end| end == b"\r\n").map_or(0, |at| at + 2);
            let so_far = [&bytes[..lines], b"\r\n"].concat();
            let request = parse(&so_far).ok().flatten();
            Read::More(request.filter(|request| request.name.is_some()))
        }
        Err(_) => Read::Not,
    }
}

fn parse(bytes: &[u8]) -> Result<Option<Request>, httparse::Error> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let mut config = httparse::ParserConfig::default();
    config.allow_multiple_spaces_in_request_line_delimiters(true);
    if config.parse_request(&mut request, bytes)?.is_partial() {
        return Ok(None);
    }
    let target = request.path.unwrap_or_default().as_bytes();
    if request.method == Some("CONNECT") {
        return Ok(Some(Request { name: authority(target), is_tunnel: true }));
    }
    // What the request asks for overrules the field (RFC 9112, section 3.2.2).
    let of_target = absolute(target).and_then(authority);
    let name = of_target.or_else(|| {
        let mut hosts = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("host"));
        let host = hosts.next()?.value.trim_ascii();
        // Two hosts are none (section 3.2).
        let is_one = hosts.all(|other| other.value.trim_ascii() == host);
        if is_one && !is_address(host) { authority(host) } else { None }
    });
    Ok(Some(Request { name, is_tunnel: false }))
}

/// The authority of `http://authority/…`.
fn absolute(target: &[u8]) -> Option<&[u8]> {
    let at = target.windows(3).position(|three| three == b"://")?;
    let is_scheme = target[..at].iter().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte));
    let rest = &target[at + 3..];
    let end = rest.iter().position(|byte| b"/?#".contains(byte)).unwrap_or(rest.len());
    (at > 0 && is_scheme).then_some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(text: &[u8]) -> Option<String> {
        match in_request(text) {
            Read::Done(request) => request.name.map(|name| name.escaped().to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_host_is_in_its_field_or_in_what_is_asked_for() {
        let host = named(b"GET /a HTTP/1.1\r\nAccept: */*\r\nhOST:  Example.ORG:8080 \r\n\r\n");
        assert_eq!(host.as_deref(), Some("example.org"));
        let proxied = named(b"GET http://u@a.example:80/x://y HTTP/1.1\r\nHost: b.example\r\n\r\n");
        assert_eq!(proxied.as_deref(), Some("a.example"));
        let not_absolute = named(b"GET /?u=http://a.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n");
        assert_eq!(not_absolute.as_deref(), Some("b.example"));
        let tunnel = in_request(b"CONNECT a.example:443 HTTP/1.1\r\nHost: b.example\r\n\r\n");
        assert_eq!(tunnel, Read::Done(Request { name: Some("a.example".into()), is_tunnel: true }));
    }

    #[test]
    fn an_address_or_two_hosts_are_no_name() {
        for text in [
            b"GET / HTTP/1.0\r\n\r\n".as_slice(),
            b"GET / HTTP/1.1\r\nHost: 192.0.2.1:8080\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a.example\x1b[2J\r\n\r\n",
        ] {
            assert!(matches!(in_request(text), Read::Not | Read::Done(Request { name: None, .. })));
        }
    }

    #[test]
    fn the_host_is_known_before_the_request_is_whole() {
        let text = b"GET /a HTTP/1.1\r\nHost: a.example\r\nCookie: x\r\n\r\n";
        for end in 4..text.len() {
            let Read::More(so_far) = in_request(&text[..end]) else { panic!("{end}") };
            assert_eq!(so_far.is_some(), end >= 34, "{end}");
        }
    }

    #[test]
    fn what_only_looks_like_it_is_none() {
        assert!(is_request(b"OPTIONS rtsp://a.example RTSP/1.0\r\n"));
        assert_eq!(in_request(b"OPTIONS rtsp://a.example RTSP/1.0\r\nHost: a\r\n\r\n"), Read::Not);
        assert!(!is_request(b"EHLO a.example\r\n") && !is_request(b"get / HTTP/1.1"));
    }
}
