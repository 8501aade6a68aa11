//! Which interfaces are watched, which should be and are not, and since when.
//!
//! An attachment that failed is tried again every second, and one that somebody took away is noticed at the next
//! [`Interfaces::verify`]: "watching" is checked, not assumed.

use std::collections::BTreeMap;

use ipnet::IpNet;
use netmon_common::model::{Event, Gap, GapReason, Interface, InterfaceFailed};
use netmon_common::raw::Raw;

use crate::chain;
use crate::clock::Now;
use crate::kernel::Kernel;
use crate::links::{self, Choice, Left, Link, Verdict};
use crate::recorder::Recorder;
use crate::status;
use crate::transfers::Through;

/// The interfaces of this PC.
#[derive(Debug)]
pub struct Interfaces {
    choice: Choice,
    /// As last listed, by index.
    links: BTreeMap<u32, Link>,
    /// What is to become of each of `links`.
    verdicts: BTreeMap<u32, Verdict>,
    watched: BTreeMap<u32, Watched>,
    failed: BTreeMap<u32, Failure>,
    /// Said to be left, as it was said; forgotten with the interface.
    told_left: BTreeMap<u32, String>,
    /// Those that went, by index, which the kernel does not give to another one soon: what crossed them last is read later.
    gone: BTreeMap<u32, Through>,
    /// All of `watched` was seen to be attached at this wall time.
    verified_wall_ns: i64,
}

#[derive(Debug)]
struct Watched {
    interface: Interface,
    /// `ARPHRD_` number when it was attached to: it decides which programs hang there.
    link_type: u16,
}

#[derive(Debug)]
struct Failure {
    error: String,
    since_wall_ns: i64,
}

impl Interfaces {
    /// Nothing is known yet.
    pub fn new(choice: Choice, now: &Now) -> Self {
        Self {
            choice,
            links: BTreeMap::new(),
            verdicts: BTreeMap::new(),
            watched: BTreeMap::new(),
            failed: BTreeMap::new(),
            told_left: BTreeMap::new(),
            gone: BTreeMap::new(),
            verified_wall_ns: now.wall_ns,
        }
    }

    /// Takes in a new list: attaches to what came, forgets what went.
    pub fn update(&mut self, now: &Now, links: Vec<Link>, kernel: &mut Kernel, recorder: &mut Recorder) {
        self.verdicts = self.choice.judge(&links);
        self.list(links);
        let gone: Vec<u32> = self
            .watched
            .iter()
            .filter(|(index, watched)| !self.is_wanted(**index) || self.has_other_frames(**index, watched))
            .map(|(index, _)| *index)
            .collect();
        let given_up: Vec<u32> =
            self.failed.keys().copied().filter(|index| !self.is_wanted(*index)).collect();
        for index in gone {
            self.detach(now, index, kernel, recorder);
        }
        for index in given_up {
            self.end_failure(now, index, recorder);
        }
        self.rename(now, recorder);
        self.attach_missing(now, kernel, recorder);
        self.tell_left();
    }

    /// Most interfaces that are remembered after they went.
    const MAX_GONE: usize = 256;

    fn list(&mut self, links: Vec<Link>) {
        let links: BTreeMap<u32, Link> = links.into_iter().map(|link| (link.index, link)).collect();
        let gone: Vec<u32> = self.links.keys().copied().filter(|index| !links.contains_key(index)).collect();
        for index in gone {
            self.gone.insert(index, self.through(index));
        }
        self.gone.retain(|index, _| !links.contains_key(index));
        while self.gone.len() > Self::MAX_GONE {
            self.gone.pop_first();
        }
        self.links = links;
    }

    /// Says once of each interface that is left why it is.
    fn tell_left(&mut self) {
        self.told_left.retain(|index, _| self.links.contains_key(index));
        let asked = links::left(self.links.values(), &self.verdicts).filter(Left::is_asked_about);
        for left in asked.take(status::MAX_LEFT) {
            let line = left.to_string();
            if self.told_left.get(&left.link.index) != Some(&line) {
                let name = Raw::from(left.link.name.as_str());
                tracing::info!(interface = %name.escaped(), reason = %left.reason, "not watching an interface");
                self.told_left.insert(left.link.index, line);
            }
        }
    }

    /// Tries again what failed.
    pub fn retry(&mut self, now: &Now, kernel: &mut Kernel, recorder: &mut Recorder) {
        if !self.failed.is_empty() {
            self.attach_missing(now, kernel, recorder);
        }
    }

    /// Asks the kernel whether everything is still attached; what is not becomes a gap and is attached again.
    pub fn verify(&mut self, now: &Now, kernel: &mut Kernel, recorder: &mut Recorder) {
        for index in kernel.verify() {
            let name = self.name(index);
            tracing::error!(interface = %name.escaped(), "somebody has detached the programs, attaching again");
            self.detach(now, index, kernel, recorder);
            recorder.record(now, not_watched(self.verified_wall_ns, now));
        }
        self.attach_missing(now, kernel, recorder);
        self.verified_wall_ns = now.wall_ns;
    }

    /// The agent stops: what was not watched until now is told.
    pub fn stop(&mut self, now: &Now, recorder: &mut Recorder) {
        let failed: Vec<u32> = self.failed.keys().copied().collect();
        for index in failed {
            self.end_failure(now, index, recorder);
        }
    }

    /// Name of an interface; empty when it is not listed.
    pub fn name(&self, index: u32) -> Raw {
        self.links.get(&index).map_or_else(Raw::default, |link| Raw::from(link.name.as_str()))
    }

    /// What packets crossed that had this index; empty: nobody knows.
    pub fn through(&self, index: u32) -> Through {
        match self.links.get(&index) {
            Some(link) => {
                Through { name: Raw::from(link.name.as_str()), usb: links::is_over_usb(link, &self.links) }
            }
            None => self.gone.get(&index).cloned().unwrap_or_default(),
        }
    }

    /// What is watched, by index.
    pub fn watched(&self) -> impl Iterator<Item = &Interface> {
        self.watched.values().map(|watched| &watched.interface)
    }

    /// What cannot be watched, each with its reason, for people.
    pub fn failures(&self) -> Vec<String> {
        let failed = self.failed.iter();
        failed.map(|(index, failure)| format!("{}: {}", self.name(*index).escaped(), failure.error)).collect()
    }

    /// What is left and may be asked about, each with its reason, for people; and how many more there are.
    pub fn left(&self) -> (Vec<String>, usize) {
        let asked = || links::left(self.links.values(), &self.verdicts).filter(Left::is_asked_about);
        let named: Vec<_> = asked().take(status::MAX_LEFT).map(|left| left.to_string()).collect();
        let unnamed = asked().count() - named.len();
        (named, unnamed)
    }

    /// Prefixes of the PC's own links.
    pub fn on_link(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.links.values().flat_map(|link| link.on_link.iter().copied())
    }

    fn is_wanted(&self, index: u32) -> bool {
        self.verdicts.get(&index) == Some(&Verdict::Watch)
    }

    /// A modem or a Wi-Fi card was switched to frames of another kind: other programs have to read them.
    fn has_other_frames(&self, index: u32, watched: &Watched) -> bool {
        self.links.get(&index).is_some_and(|link| link.link_type != watched.link_type)
    }

    /// The log follows an interface that has a new name. The programs stay where they are: nothing is missed.
    fn rename(&mut self, now: &Now, recorder: &mut Recorder) {
        for (index, watched) in &mut self.watched {
            let Some(link) = self.links.get(index) else { continue };
            let name = Raw::from(link.name.as_str());
            if name != watched.interface.name {
                recorder.record(now, Event::InterfaceDetached(watched.interface.clone()));
                watched.interface.name = name;
                recorder.record(now, Event::InterfaceAttached(watched.interface.clone()));
            }
        }
    }

    fn attach_missing(&mut self, now: &Now, kernel: &mut Kernel, recorder: &mut Recorder) {
        let missing: Vec<u32> = self
            .links
            .keys()
            .copied()
            .filter(|index| self.is_wanted(*index) && !self.watched.contains_key(index))
            .collect();
        for index in missing {
            self.attach(now, index, kernel, recorder);
        }
    }

    fn attach(&mut self, now: &Now, index: u32, kernel: &mut Kernel, recorder: &mut Recorder) {
        let name = self.name(index);
        match kernel.attach(index) {
            Ok(hook) => {
                self.end_failure(now, index, recorder);
                let interface = Interface { name, index, hook };
                let link_type = self.links.get(&index).map_or(0, |link| link.link_type);
                self.watched.insert(index, Watched { interface: interface.clone(), link_type });
                recorder.record(now, Event::InterfaceAttached(interface));
            }
            Err(error) => {
                let error = chain(&error);
                let failure = self
                    .failed
                    .entry(index)
                    .or_insert_with(|| Failure { error: String::new(), since_wall_ns: now.wall_ns });
                // Tried every second: said once, and again when the reason changes.
                if failure.error != error {
                    tracing::error!(interface = %name.escaped(), error, "cannot watch an interface");
                    failure.error.clone_from(&error);
                    let error = Raw::new(error);
                    recorder.record(now, Event::InterfaceFailed(InterfaceFailed { name, index, error }));
                }
            }
        }
    }

    fn detach(&mut self, now: &Now, index: u32, kernel: &mut Kernel, recorder: &mut Recorder) {
        if let Err(error) = kernel.detach(index) {
            let error = &error as &dyn std::error::Error;
            tracing::error!(error, index, "cannot detach from an interface");
        }
        if let Some(watched) = self.watched.remove(&index) {
            recorder.record(now, Event::InterfaceDetached(watched.interface));
        }
    }

    fn end_failure(&mut self, now: &Now, index: u32, recorder: &mut Recorder) {
        if let Some(failure) = self.failed.remove(&index) {
            recorder.record(now, not_watched(failure.since_wall_ns, now));
        }
    }
}

fn not_watched(from_wall_ns: i64, now: &Now) -> Event {
    let reason = GapReason::InterfaceNotWatched;
    Event::Gap(Gap { reason, from_wall_ns, to_wall_ns: now.wall_ns, count: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::links::Backing;

    #[test]
    fn packets_of_an_interface_that_is_gone_are_still_its_own() {
        let link = |index, name: &str, usb| Link {
            index,
            name: name.into(),
            link_type: 1,
            kind: String::new(),
            master: None,
            lower: None,
            backing: Backing::Device,
            usb,
            on_link: Vec::new(),
        };
        let choice = Choice::new(&[Choice::AUTO.to_owned()]).unwrap();
        let mut interfaces = Interfaces::new(choice, &Now::default());
        let phone = Through { name: "usb0".into(), usb: true };
        interfaces.list(vec![link(2, "eth0", false), link(3, "usb0", true)]);
        assert_eq!((interfaces.through(2), interfaces.through(3)), ("eth0".into(), phone.clone()));
        // Another device under the same name.
        interfaces.list(vec![link(2, "eth0", false), link(4, "usb0", false)]);
        assert_eq!((interfaces.through(3), interfaces.through(4)), (phone, "usb0".into()));
        assert_eq!(interfaces.through(5), Through::default());
        for index in 10..10 + 2 * Interfaces::MAX_GONE as u32 {
            interfaces.list(vec![link(index, "usb0", true)]);
        }
        assert_eq!(interfaces.gone.len(), Interfaces::MAX_GONE);
    }

    #[test]
    fn of_many_interfaces_that_are_left_some_are_named_and_the_others_counted() {
        let choice = Choice::new(&[Choice::AUTO.to_owned()]).unwrap();
        let bridge = |index| Link {
            index,
            name: format!("br{index}"),
            link_type: 1,
            kind: "bridge".into(),
            master: None,
            lower: None,
            backing: Backing::Nothing,
            usb: false,
            on_link: vec!["192.168.0.0/24".parse().unwrap()],
        };
        let links: Vec<_> = (1..=20).map(bridge).collect();
        let mut interfaces = Interfaces::new(choice, &Now::default());
        interfaces.verdicts = interfaces.choice.judge(&links);
        interfaces.links = links.into_iter().map(|link| (link.index, link)).collect();
        let (named, unnamed) = interfaces.left();
        assert_eq!((named.len(), unnamed), (status::MAX_LEFT, 20 - status::MAX_LEFT));
        assert!(named[0].starts_with("br1: no device"), "{named:?}");
        for _ in 0..2 {
            interfaces.tell_left();
            assert_eq!(interfaces.told_left.len(), status::MAX_LEFT);
        }
        interfaces.links.retain(|index, _| *index > 4);
        interfaces.tell_left();
        assert_eq!(interfaces.told_left.len(), 16, "what went is forgotten, and others are told");
    }
}
