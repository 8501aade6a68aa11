//! `netmon-server devices`.

use anyhow::Context as _;
use jiff::tz::TimeZone;
use netmon_common::logline;
use serde_json::json;

use super::{open, print, read_failed, table};
use crate::datadir::DataDir;
use crate::store::{self, Stayed};

/// Lists where USB devices were.
pub fn devices(data: &DataDir, text: Option<&str>, as_json: bool) -> anyhow::Result<()> {
    let store = open(data)?;
    let zone = TimeZone::system();
    let time = |ns| logline::time(ns, &zone).to_string();
    let stays = store::stays(store.conn()).with_context(|| read_failed(data))?;
    let wanted = text.unwrap_or_default().to_lowercase();
    let stays: Vec<_> =
        stays.into_iter().filter(|stay| says(stay).to_lowercase().contains(&wanted)).collect();
    if as_json {
        let rows: Vec<_> = stays.iter().map(|stay| row_of_json(stay, &time)).collect();
        return print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    }
    if stays.is_empty() {
        return print("no such USB device with a serial number was seen\n");
    }
    let header = ["DEVICE", "ID", "SERIAL", "SEAT", "FIRST SEEN", "LAST CAME OR LEFT", "TIMES", "NOW"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(stays.iter().map(|stay| {
        let now = match (stay.is_there, stay.is_shared) {
            (true, false) => "there",
            (true, true) => "there, COPIES",
            (false, false) => "",
            (false, true) => "COPIES",
        };
        [
            name(stay),
            id(stay),
            stay.device.serial.escaped().to_string(),
            stay.seat.clone(),
            time(stay.first_ns),
            time(stay.last_ns),
            stay.times.to_string(),
            now.to_owned(),
        ]
    }));
    print(&table(&rows))
}

fn row_of_json(stay: &Stayed, time: &impl Fn(i64) -> String) -> serde_json::Value {
    json!({
        "vendor": stay.device.vendor,
        "model": stay.device.model,
        "id": id(stay),
        "serial": stay.device.serial,
        "serial_is_shared": stay.is_shared,
        "seat": stay.seat,
        "first_seen": time(stay.first_ns),
        "last_came_or_left": time(stay.last_ns),
        "times": stay.times,
        "is_there": stay.is_there,
    })
}

fn name(stay: &Stayed) -> String {
    format!("{} {}", stay.device.vendor.escaped(), stay.device.model.escaped()).trim().to_owned()
}

fn id(stay: &Stayed) -> String {
    format!("{:04x}:{:04x}", stay.device.vendor_id, stay.device.product_id)
}

fn says(stay: &Stayed) -> String {
    [name(stay), id(stay), stay.device.serial.escaped().to_string(), stay.seat.clone()].join("\n")
}
