//! Which USB device was seen at which PC, and when: [`crate::passport`] says what follows.

use netmon_common::raw::Raw;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::AgentId;
use crate::notice::Notice;
use crate::passport::{Known, Sighting, Stay, is_fresh, judge};

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

/// Keeps a sighting; returns what there is to say of it. `recorded_ns`: by the PC's clock.
pub(super) fn saw(
    conn: &Connection,
    agent: AgentId,
    sighting: &Sighting,
    recorded_ns: i64,
    received_ns: i64,
) -> rusqlite::Result<Option<Notice>> {
    let recorded_ns = recorded_ns.saturating_sub(clock_offset(conn, agent)?);
    // What was delivered late happened when it was recorded: where a device is now, who saw it last knows.
    let seen_ns = if is_fresh(recorded_ns, received_ns) { received_ns } else { recorded_ns.min(received_ns) };
    match sighting {
        Sighting::Anew => {
            conn.prepare_cached("UPDATE usb_stays SET is_there = 0 WHERE agent = ?1 AND is_there")?
                .execute([agent.0])?;
            Ok(None)
        }
        Sighting::Left(known) => {
            let mut notice = None;
            if let Some((device, is_shared)) = find(conn, known)? {
                conn.prepare_cached(
                    "UPDATE usb_stays SET is_there = 0, last_ns = max(last_ns, ?3) WHERE device = ?1 AND agent = ?2",
                )?
                .execute([device, agent.0, seen_ns])?;
                if is_shared && !is_fresh(recorded_ns, received_ns) {
                    notice = carried(conn, device, known, agent, seen_ns)?;
                }
            }
            Ok(notice)
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
                 ON CONFLICT (device, agent) DO UPDATE
                     SET last_ns = max(last_ns, ?3), times = times + 1, is_there = 1",
            )?
            .execute([device, agent.0, seen_ns])?;
            let notice = judge(known, elsewhere, recorded_ns, received_ns);
            if let Some(Notice::SerialShared { .. }) = notice {
                conn.prepare_cached("UPDATE usb_devices SET is_shared = 1 WHERE id = ?1")?
                    .execute([device])?;
            }
            Ok(notice)
        }
    }
}

/// A device that seemed to be at two PCs at once had left this one before it came to the other, and nobody had heard of it yet:
/// a PC whose cable is pulled counts as connected for some seconds. So it is one device after all.
fn carried(
    conn: &Connection,
    device: i64,
    known: &Known,
    agent: AgentId,
    left_ns: i64,
) -> rusqlite::Result<Option<Notice>> {
    let mut others = conn.prepare_cached(
        "SELECT seat, first_ns, last_ns FROM usb_stays JOIN agents ON agents.id = agent
         WHERE device = ?1 AND agent != ?2 ORDER BY last_ns DESC LIMIT 2",
    )?;
    let others: Vec<(String, i64, i64)> = others
        .query_map([device, agent.0], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<Result<_, _>>()?;
    // Where more have it, it tells nothing anyway.
    let [(seat, first_ns, last_ns)] = &others[..] else { return Ok(None) };
    if *first_ns < left_ns {
        return Ok(None);
    }
    conn.prepare_cached("UPDATE usb_devices SET is_shared = 0 WHERE id = ?1")?.execute([device])?;
    let stay = Stay { seat: Raw::new(seat), last_ns: *last_ns, is_there: false };
    Ok(judge(known, Some(stay), left_ns, left_ns))
}

/// The PC's clock minus the server's, as far as is known.
fn clock_offset(conn: &Connection, agent: AgentId) -> rusqlite::Result<i64> {
    let mut offset = conn.prepare_cached("SELECT coalesce(offset_ns, 0) FROM agents WHERE id = ?1")?;
    Ok(offset.query_row([agent.0], |row| row.get(0)).optional()?.unwrap_or_default())
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
            self.record_at(agent, self.now_ns, event, self.now_ns)
        }

        /// A record that was made at one time, by the PC's clock, and comes in at another.
        fn record_at(&mut self, agent: AgentId, wall_ns: i64, event: Event, now_ns: i64) -> Vec<Notice> {
            let seq = *self.seqs.entry(agent).and_modify(|seq| *seq += 1).or_insert(1);
            let record = Record { seq, run: 1, boot_ns: 0, wall_ns, event };
            let items = check(seq, vec![wire::Item::Record(record.to_bytes().unwrap())]).unwrap();
            let before = self.notices(agent).len();
            append(self.room.conn(), agent, 7, seq, &items, now_ns).unwrap();
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
    fn a_stick_that_was_carried_while_its_pc_was_not_heard_is_one_device_once_that_is_known() {
        let (mut room, [first, second]) = room();
        room.record(first, Event::DeviceAdded(stick()));
        // The cable is pulled, then the stick, at 2 s; the server has not noticed yet.
        room.now_ns = 3 * SECOND;
        let notices = room.record(second, Event::DeviceAdded(stick()));
        assert!(matches!(&notices[..], [Notice::SerialShared { .. }]), "{notices:?}");
        let late = room.record_at(first, 2 * SECOND, Event::DeviceRemoved(stick()), 60 * SECOND);
        assert!(
            matches!(&late[..], [Notice::DeviceMoved { last_ns, .. }] if *last_ns == 4 * SECOND),
            "{late:?}"
        );
        room.now_ns = 70 * SECOND;
        room.record(second, Event::DeviceRemoved(stick()));
        let back = room.record(first, Event::DeviceAdded(stick()));
        assert!(matches!(&back[..], [Notice::DeviceMoved { .. }]), "{back:?}");
    }

    #[test]
    fn what_a_pc_that_was_away_delivers_late_happened_when_it_was_recorded() {
        let (mut room, [first, second]) = room();
        // The first PC's clock is an hour ahead, and that is known. It saw the stick at 1 and 2 s and delivers that at 1,000 s.
        room.room
            .conn()
            .execute("UPDATE agents SET offset_ns = ?2 WHERE id = ?1", [first.0, 3_600 * SECOND])
            .unwrap();
        room.now_ns = 899 * SECOND;
        assert_eq!(room.record(second, Event::DeviceAdded(stick())), []);
        let mut away = Vec::new();
        for (recorded_s, event) in [(1, Event::DeviceAdded(stick())), (2, Event::DeviceRemoved(stick()))] {
            away.extend(room.record_at(first, (3_600 + recorded_s) * SECOND, event, 1_000 * SECOND));
        }
        assert_eq!(away.len(), 1, "{away:?}");
        room.now_ns = 1_100 * SECOND;
        assert_eq!(room.record(second, Event::DeviceRemoved(stick())), []);
        assert_eq!(room.record(second, Event::DeviceAdded(stick())), [], "it was here all the time");
        let seen = stays(room.room.conn()).unwrap();
        assert_eq!((&*seen[0].seat, seen[0].last_ns), ("pc-12", 2 * SECOND));
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
