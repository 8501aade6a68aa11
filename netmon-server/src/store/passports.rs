//! Which USB device was seen at which PC, and when: [`crate::passport`] says what follows.

use netmon_common::raw::Raw;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::AgentId;
use crate::notice::Notice;
use crate::passport::{Known, Sighting, Stay, judge};

/// A device at a seat, for a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stayed {
    /// The device.
    pub device: Known,
    /// True when several devices have this serial number.
    pub is_shared: bool,
    /// The seat.
    pub seat: String,
    /// When it was first seen there, the server's clock.
    pub first_ns: i64,
    /// When it was last said to have come or gone there, the server's clock.
    pub last_ns: i64,
    /// How often it came.
    pub times: u64,
    /// True when it came and nobody said that it left.
    pub is_there: bool,
}

/// Keeps a sighting; returns what there is to say of it.
pub(super) fn saw(
    conn: &Connection,
    agent: AgentId,
    sighting: &Sighting,
    recorded_ns: i64,
    received_ns: i64,
) -> rusqlite::Result<Option<Notice>> {
    match sighting {
        Sighting::Anew => {
            conn.prepare_cached("UPDATE usb_stays SET is_there = 0 WHERE agent = ?1 AND is_there")?
                .execute([agent.0])?;
            Ok(None)
        }
        Sighting::Left(known) => {
            if let Some((device, _)) = find(conn, known)? {
                conn.prepare_cached(
                    "UPDATE usb_stays SET is_there = 0, last_ns = ?3 WHERE device = ?1 AND agent = ?2",
                )?
                .execute([device, agent.0, received_ns])?;
            }
            Ok(None)
        }
        Sighting::Came(known) => {
            let (device, is_shared) = match find(conn, known)? {
                Some(found) => found,
                None => (add(conn, known)?, false),
            };
            let elsewhere = if is_shared { None } else { newest_elsewhere(conn, device, agent)? };
            conn.prepare_cached(
                "INSERT INTO usb_stays (device, agent, first_ns, last_ns, times, is_there)
                     VALUES (?1, ?2, ?3, ?3, 1, 1)
                 ON CONFLICT (device, agent) DO UPDATE SET last_ns = ?3, times = times + 1, is_there = 1",
            )?
            .execute([device, agent.0, received_ns])?;
            let notice = judge(known, elsewhere, recorded_ns, received_ns);
            if let Some(Notice::SerialShared { .. }) = notice {
                conn.prepare_cached("UPDATE usb_devices SET is_shared = 1 WHERE id = ?1")?
                    .execute([device])?;
            }
            Ok(notice)
        }
    }
}

/// The device's number, and whether several have its serial number.
fn find(conn: &Connection, known: &Known) -> rusqlite::Result<Option<(i64, bool)>> {
    conn.prepare_cached(
        "SELECT id, is_shared FROM usb_devices WHERE vendor_id = ?1 AND product_id = ?2 AND serial = ?3",
    )?
    .query_row(params![known.vendor_id, known.product_id, known.serial.as_bytes()], |row| {
        Ok((row.get(0)?, row.get(1)?))
    })
    .optional()
}

fn add(conn: &Connection, known: &Known) -> rusqlite::Result<i64> {
    let Known { vendor_id, product_id, serial, vendor, model } = known;
    conn.prepare_cached(
        "INSERT INTO usb_devices (vendor_id, product_id, serial, vendor, model) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .insert(params![vendor_id, product_id, serial.as_bytes(), vendor.as_bytes(), model.as_bytes()])
}

/// The newest stay, unless that was at this PC.
fn newest_elsewhere(conn: &Connection, device: i64, agent: AgentId) -> rusqlite::Result<Option<Stay>> {
    let newest = conn
        .prepare_cached(
            "SELECT agent, seat, last_ns, is_there AND connection IS NOT NULL
             FROM usb_stays JOIN agents ON agents.id = agent
             WHERE device = ?1 ORDER BY last_ns DESC, agent = ?2 LIMIT 1",
        )?
        .query_row([device, agent.0], |row| {
            let stay = Stay {
                seat: Raw::new(row.get_ref(1)?.as_bytes()?),
                last_ns: row.get(2)?,
                is_there: row.get(3)?,
            };
            Ok((row.get::<_, i64>(0)?, stay))
        })
        .optional()?;
    Ok(newest.filter(|(at, _)| *at != agent.0).map(|(_, stay)| stay))
}

/// Every device with a serial number, and where it was: by device, in order of time.
pub fn stays(conn: &Connection) -> rusqlite::Result<Vec<Stayed>> {
    conn.prepare(
        "SELECT vendor_id, product_id, serial, vendor, model, is_shared, seat, first_ns, last_ns, times, is_there
         FROM usb_stays JOIN usb_devices ON usb_devices.id = device JOIN agents ON agents.id = agent
         ORDER BY device, last_ns, agent",
    )?
    .query_map([], |row| {
        let raw = |column| Ok::<_, rusqlite::Error>(Raw::new(row.get_ref(column)?.as_bytes()?));
        Ok(Stayed {
            device: Known {
                vendor_id: row.get(0)?,
                product_id: row.get(1)?,
                serial: raw(2)?,
                vendor: raw(3)?,
                model: raw(4)?,
            },
            is_shared: row.get(5)?,
            seat: row.get(6)?,
            first_ns: row.get(7)?,
            last_ns: row.get(8)?,
            times: row.get::<_, i64>(9)? as u64,
            is_there: row.get(10)?,
        })
    })?
    .collect()
}

#[cfg(test)]
mod tests {
    use netmon_common::model::{AgentStarted, Event, Record, UsbDevice};
    use netmon_common::wire;

    use super::*;
    use crate::ingest::check;
    use crate::store::tests::Fixture;
    use crate::store::{What, append, connected, items_from};

    const SECOND: i64 = 1_000_000_000;

    struct Room {
        room: Fixture,
        seqs: std::collections::BTreeMap<AgentId, u64>,
        now_ns: i64,
    }

    impl Room {
        /// A record comes in, one second after the one before; what the server noticed with it.
        fn record(&mut self, agent: AgentId, event: Event) -> Vec<Notice> {
            self.now_ns += SECOND;
            let seq = *self.seqs.entry(agent).and_modify(|seq| *seq += 1).or_insert(1);
            let record = Record { seq, run: 1, boot_ns: 0, wall_ns: self.now_ns, event };
            let items = check(seq, vec![wire::Item::Record(record.to_bytes().unwrap())]).unwrap();
            let before = self.notices(agent).len();
            append(self.room.conn(), agent, 7, seq, &items, self.now_ns).unwrap();
            self.notices(agent).split_off(before)
        }

        fn notices(&self, agent: AgentId) -> Vec<Notice> {
            let items = items_from(self.room.conn(), agent, 1, 1000).unwrap();
            let notice = |item: crate::store::Item| match item.what {
                What::Notice { notice, .. } => notice,
                _ => None,
            };
            items.into_iter().filter_map(notice).collect()
        }
    }

    fn room() -> (Room, [AgentId; 2]) {
        let room = Fixture::new();
        let agents = room.agents(["pc-12", "pc-17"]);
        for (agent, connection) in agents.into_iter().zip(1..) {
            connected(room.conn(), agent, connection, &"pc".into(), &"0".into(), 0).unwrap();
        }
        (Room { room, seqs: Default::default(), now_ns: 0 }, agents)
    }

    fn stick() -> UsbDevice {
        UsbDevice {
            vendor: "SanDisk".into(),
            model: "Ultra".into(),
            serial: "4C53".into(),
            ..UsbDevice::default()
        }
    }

    #[test]
    fn a_stick_that_is_carried_to_another_pc_is_known_there_and_on_its_way_back() {
        let (mut room, [first, second]) = room();
        assert_eq!(room.record(first, Event::DeviceAdded(stick())), []);
        assert_eq!(room.record(first, Event::DeviceRemoved(stick())), []);
        assert_eq!(room.record(first, Event::DeviceAdded(stick())), [], "the same place again");
        assert_eq!(room.record(first, Event::DeviceRemoved(stick())), []);
        let moved = |seat: &str, last_ns| Notice::DeviceMoved {
            vendor: "SanDisk".into(),
            model: "Ultra".into(),
            serial: "4C53".into(),
            seat: seat.into(),
            last_ns,
        };
        assert_eq!(room.record(second, Event::DeviceAdded(stick())), [moved("pc-12", 4 * SECOND)]);
        assert_eq!(room.record(second, Event::DeviceRemoved(stick())), []);
        assert_eq!(room.record(first, Event::DevicePresent(stick())), [moved("pc-17", 6 * SECOND)]);
        let seen: Vec<_> = stays(room.room.conn())
            .unwrap()
            .into_iter()
            .map(|stay| (stay.seat, stay.first_ns, stay.last_ns, stay.times, stay.is_there))
            .collect();
        assert_eq!(
            seen,
            [
                ("pc-17".to_owned(), 5 * SECOND, 6 * SECOND, 1, false),
                ("pc-12".to_owned(), SECOND, 7 * SECOND, 3, true)
            ]
        );
    }

    #[test]
    fn a_serial_number_that_is_at_two_pcs_at_once_is_told_once_and_then_tells_nothing() {
        let (mut room, [first, second]) = room();
        assert_eq!(room.record(first, Event::DevicePresent(stick())), []);
        let notices = room.record(second, Event::DevicePresent(stick()));
        assert!(matches!(&notices[..], [Notice::SerialShared { .. }]), "{notices:?}");
        assert_eq!(room.record(first, Event::DeviceAdded(stick())), []);
        assert!(stays(room.room.conn()).unwrap().iter().all(|stay| stay.is_shared));
    }

    #[test]
    fn what_an_agent_that_was_started_anew_does_not_name_is_not_there() {
        let (mut room, [first, second]) = room();
        room.record(first, Event::DeviceAdded(stick()));
        let started = AgentStarted {
            version: "0".into(),
            kernel: "6".into(),
            hostname: "pc-12".into(),
            boot_id: [0; 16],
            previous_run_died: false,
        };
        assert_eq!(room.record(first, Event::AgentStarted(started)), []);
        let notices = room.record(second, Event::DeviceAdded(stick()));
        assert!(matches!(&notices[..], [Notice::DeviceMoved { .. }]), "{notices:?}");
    }

    #[test]
    fn where_the_other_pc_is_not_heard_its_stick_may_have_been_carried() {
        let (mut room, [first, second]) = room();
        room.record(first, Event::DeviceAdded(stick()));
        room.room.conn().execute("UPDATE agents SET connection = NULL WHERE id = ?1", [first.0]).unwrap();
        let notices = room.record(second, Event::DeviceAdded(stick()));
        assert!(matches!(&notices[..], [Notice::DeviceMoved { .. }]), "{notices:?}");
    }
}
