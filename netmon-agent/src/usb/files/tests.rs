use super::*;

const MS: u64 = 1_000_000;
const WALL: i64 = 1_700_000_000_000_000_000;

fn at(ms: u64) -> Now {
    Now { boot_ns: 10 * SECOND_NS + ms * MS, wall_ns: WALL + (ms * MS) as i64 }
}

fn stick() -> Disk {
    Disk { name: "sdb".into(), vendor: "SanDisk".into(), model: "Ultra".into(), serial: "4C53".into() }
}

const OPENED: Happened = Happened {
    opened: true,
    read: false,
    written: false,
    closed_after_reading: false,
    closed_after_writing: false,
};
const NOTHING: Happened = Happened { opened: false, ..OPENED };
const READ: Happened = Happened { read: true, ..NOTHING };
const WRITTEN: Happened = Happened { written: true, ..NOTHING };
const CLOSED: Happened = Happened { closed_after_reading: true, ..NOTHING };
const CLOSED_WRITER: Happened = Happened { closed_after_writing: true, ..NOTHING };

fn number(minor: u32) -> DeviceNumber {
    DeviceNumber { major: 8, minor }
}

fn id(inode: u64) -> FileId {
    FileId { volume: number(1), device: 0x811, inode }
}

/// An event of a file that was changed long ago.
fn event(inode: u64, pid: u32, happened: Happened) -> FileEvent {
    FileEvent {
        file: id(inode),
        pid,
        happened,
        bytes: 5_000,
        allocated: 8_192,
        changed_wall_ns: WALL - 3_600 * SECOND_NS as i64,
        place: Some(Place { directory: "/media/USB".into(), name: Raw::new(format!("file{inode}")) }),
        who: Some(Who { program: "cp".into(), uid: 1005 }),
    }
}

fn watched() -> Files {
    let mut files = Files::default();
    files.watch(number(1), stick());
    files
}

fn told(files: &mut Files) -> Vec<Event> {
    std::iter::from_fn(|| files.poll()).collect()
}

/// Name, access, process, size.
type Line = (String, FileAccess, u32, Option<u64>);

fn line(event: Event) -> Line {
    let Event::UsbFile(file) = event else { panic!("{event:?}") };
    (file.name.escaped().to_string(), file.access, file.pid, file.bytes)
}

/// What is told of these events, each a millisecond after the one before.
fn lines(events: impl IntoIterator<Item = FileEvent>) -> Vec<Line> {
    let mut files = watched();
    let mut ms = 0;
    for event in events {
        files.take(event, &at(ms));
        ms += 1;
    }
    files.handle_timeout(&at(ms + 1_000));
    told(&mut files).into_iter().map(line).collect()
}

#[test]
fn a_file_that_was_written_is_told_with_all_that_is_known_a_second_after_it_was_closed() {
    let mut files = watched();
    files.take(event(1, 7, OPENED), &at(0));
    assert_eq!(files.due_ns(), None);
    files.take(event(1, 7, WRITTEN), &at(10));
    files.take(FileEvent { bytes: 20_000_000, ..event(1, 7, CLOSED_WRITER) }, &at(500));
    assert_eq!(files.due_ns(), Some(at(1_500).boot_ns));
    files.handle_timeout(&at(1_499));
    assert_eq!(told(&mut files), []);
    files.handle_timeout(&at(1_500));
    let file = UsbFile {
        disk: stick(),
        directory: "/media/USB".into(),
        name: "file1".into(),
        access: FileAccess::Written,
        bytes: Some(20_000_000),
        program: "cp".into(),
        pid: 7,
        uid: Some(1005),
        user: Raw::default(),
    };
    assert_eq!(told(&mut files), [Event::UsbFile(file)]);
    assert_eq!(files.due_ns(), None);
}

#[test]
fn a_file_of_which_no_read_was_seen_was_opened_and_perhaps_read() {
    let merged = Happened { opened: true, closed_after_reading: true, ..NOTHING };
    let opened = |name: &str, pid| (name.to_owned(), FileAccess::Opened, pid, Some(5_000));
    assert_eq!(
        lines([event(1, 7, OPENED), event(1, 7, CLOSED), event(2, 7, merged)]),
        [opened("file1", 7), opened("file2", 7)]
    );
    // Who opened it for somebody else's reading did not read.
    let read = ("file1".to_owned(), FileAccess::Read, 8, Some(5_000));
    assert_eq!(lines([event(1, 7, OPENED), event(1, 8, READ), event(1, 8, CLOSED)]), [read]);
    // What is still open when the watch ends is nothing yet.
    let mut files = watched();
    files.take(event(1, 7, OPENED), &at(0));
    files.end(&at(1));
    assert_eq!(told(&mut files), []);
}

#[test]
fn who_opens_a_file_twice_and_reads_it_once_has_read_it() {
    let merged = Happened { opened: true, closed_after_reading: true, ..NOTHING };
    let read = Happened { read: true, ..merged };
    let expected = [("file1".to_owned(), FileAccess::Read, 7, Some(5_000))];
    assert_eq!(lines([event(1, 7, merged), event(1, 7, read)]), expected);
    assert_eq!(lines([event(1, 7, read), event(1, 7, merged)]), expected);
}

#[test]
fn who_could_write_and_only_read_has_read() {
    let read = Happened { opened: true, ..READ };
    let expected = ("file1".into(), FileAccess::Read, 7, Some(5_000));
    assert_eq!(lines([event(1, 7, read), event(1, 7, CLOSED_WRITER)]), [expected]);
    let opened = ("file1".into(), FileAccess::Opened, 7, Some(5_000));
    assert_eq!(lines([event(1, 7, OPENED), event(1, 7, CLOSED_WRITER)]), [opened]);
}

#[test]
fn a_change_that_only_the_files_times_show_is_a_write() {
    // FAT rounds down to two seconds.
    for (changed, access) in [(-1_900, FileAccess::Written), (-2_100, FileAccess::Read)] {
        let changed_wall_ns = WALL + changed * MS as i64;
        let closed = FileEvent { changed_wall_ns, ..event(1, 7, Happened { read: true, ..CLOSED_WRITER }) };
        let found = lines([event(1, 7, OPENED), closed]);
        assert_eq!(found[0].1, access);
    }
}

#[test]
fn who_had_a_file_open_for_writing_before_anybody_looked_has_written() {
    assert_eq!(lines([event(1, 7, CLOSED_WRITER)])[0].1, FileAccess::Written);
    assert_eq!(lines([event(1, 7, CLOSED)])[0].1, FileAccess::Opened);
}

#[test]
fn whoever_wrote_by_a_descriptor_of_its_parent_is_told_and_the_parent_is_not() {
    // (cat; echo) > file: the shell opens and closes, two others write.
    let closed = FileEvent { changed_wall_ns: WALL, ..event(1, 7, CLOSED_WRITER) };
    let found = lines([event(1, 7, OPENED), event(1, 8, WRITTEN), event(1, 9, WRITTEN), closed]);
    let pids: Vec<_> = found.iter().map(|line| (line.1, line.2)).collect();
    assert_eq!(pids, [(FileAccess::Written, 8), (FileAccess::Written, 9)]);
}

#[test]
fn whoever_wrote_and_ended_before_its_child_is_told_when_the_child_closes() {
    let found = lines([event(1, 7, OPENED), event(1, 7, WRITTEN), event(1, 8, CLOSED_WRITER)]);
    let told: Vec<_> = found.iter().map(|line| (line.1, line.2)).collect();
    assert!(told.contains(&(FileAccess::Written, 7)), "{told:?}");
}

#[test]
fn another_program_that_has_the_file_open_is_told_when_it_closes() {
    let mut files = watched();
    for pid in [7, 8] {
        files.take(event(1, pid, Happened { opened: true, ..READ }), &at(0));
    }
    files.take(event(1, 7, CLOSED), &at(1));
    files.handle_timeout(&at(1_001));
    assert_eq!(told(&mut files).into_iter().map(|event| line(event).2).collect::<Vec<_>>(), [7]);
    files.take(event(1, 8, CLOSED), &at(2_000));
    files.handle_timeout(&at(3_000));
    assert_eq!(told(&mut files).into_iter().map(|event| line(event).2).collect::<Vec<_>>(), [8]);
}

#[test]
fn a_hundred_closings_in_a_second_are_one_line_with_the_last_size() {
    let once = |bytes| {
        [event(1, 7, Happened { opened: true, ..WRITTEN }), FileEvent { bytes, ..event(1, 7, CLOSED_WRITER) }]
    };
    let found = lines((1..=100).flat_map(once));
    assert_eq!(found, [("file1".into(), FileAccess::Written, 7, Some(100))]);
}

#[test]
fn reading_and_writing_are_two_lines_and_the_second_second_another() {
    let mut files = watched();
    let merged = Happened { opened: true, ..WRITTEN };
    files.take(event(1, 7, Happened { read: true, closed_after_reading: true, ..OPENED }), &at(0));
    files.take(event(1, 7, Happened { closed_after_writing: true, ..merged }), &at(1));
    files.handle_timeout(&at(1_001));
    files.take(event(1, 7, Happened { closed_after_writing: true, ..merged }), &at(1_002));
    files.handle_timeout(&at(2_002));
    let found: Vec<_> = told(&mut files).into_iter().map(|event| line(event).1).collect();
    assert_eq!(found, [FileAccess::Read, FileAccess::Written, FileAccess::Written]);
}

#[test]
fn a_program_that_is_gone_is_whoever_it_was_seen_to_be_before_or_unknown() {
    let gone = |happened| FileEvent { who: None, place: None, ..event(1, 7, happened) };
    let program = |events: [FileEvent; 2]| {
        let mut files = watched();
        for event in events {
            files.take(event, &at(0));
        }
        files.handle_timeout(&at(1_000));
        let Some(Event::UsbFile(file)) = files.poll() else { panic!("no file") };
        (file.program, file.uid, file.pid, file.name)
    };
    let opened = Happened { opened: true, ..WRITTEN };
    assert_eq!(
        program([event(1, 7, opened), gone(CLOSED_WRITER)]),
        ("cp".into(), Some(1005), 7, "file1".into())
    );
    assert_eq!(program([gone(opened), gone(CLOSED_WRITER)]), (Raw::default(), None, 7, Raw::default()));
}

#[test]
fn five_thousand_files_at_once_are_a_thousand_lines_and_a_count_of_the_others() {
    let mut files = watched();
    for inode in 0..5_000 {
        let happened = Happened { opened: true, written: true, ..CLOSED_WRITER };
        files.take(event(inode, 7, happened), &at(inode / 10));
        files.handle_timeout(&at(inode / 10));
    }
    files.handle_timeout(&at(3_000));
    let (named, counted): (Vec<_>, Vec<_>) =
        told(&mut files).into_iter().partition(|event| matches!(event, Event::UsbFile(_)));
    // Half a second went by: a hundred more than the burst, as precisely as it was counted.
    assert_eq!(named.len() as u64, BURST + RATE / 2 - 1);
    let [Event::UsbFilesUnseen(unseen)] = counted[..] else { panic!("{counted:?}") };
    assert_eq!((unseen.reason, unseen.count), (FilesUnseen::TooMany, Some(5_000 - named.len() as u64)));
    assert!(WALL <= unseen.from_wall_ns && unseen.from_wall_ns < unseen.to_wall_ns);
    assert_eq!(files.due_ns(), None);
}

#[test]
fn names_go_on_at_their_rate_and_losses_are_told_once_a_second() {
    let mut files = watched();
    let happened = Happened { opened: true, written: true, ..CLOSED_WRITER };
    for ms in 0..10_000 {
        files.take(event(ms, 7, happened), &at(ms));
        files.handle_timeout(&at(ms));
    }
    files.end(&at(10_000));
    let (named, counted): (Vec<_>, Vec<_>) =
        told(&mut files).into_iter().partition(|event| matches!(event, Event::UsbFile(_)));
    assert!((BURST + 10 * RATE - 2..=BURST + 10 * RATE).contains(&(named.len() as u64)), "{}", named.len());
    assert!((8..=11).contains(&counted.len()), "{}", counted.len());
    let lost: u64 = counted
        .iter()
        .map(|event| match event {
            Event::UsbFilesUnseen(unseen) => unseen.count.unwrap(),
            other => panic!("{other:?}"),
        })
        .sum();
    assert_eq!(named.len() as u64 + lost, 10_000);
}

#[test]
fn a_full_queue_is_one_gap_of_unknown_count_since_the_queue_was_empty_last() {
    let mut files = watched();
    files.lost(number(1), at(5).wall_ns, &at(10));
    files.lost(number(1), at(400).wall_ns, &at(500));
    files.handle_timeout(&at(1_009));
    assert_eq!(told(&mut files), []);
    assert_eq!(files.due_ns(), Some(at(1_010).boot_ns));
    files.handle_timeout(&at(1_010));
    let unseen = UsbFilesUnseen {
        reason: FilesUnseen::QueueFull,
        from_wall_ns: at(5).wall_ns,
        to_wall_ns: at(1_010).wall_ns,
        count: None,
    };
    assert_eq!(told(&mut files), [Event::UsbFilesUnseen(unseen)]);
}

#[test]
fn the_end_of_a_watch_tells_what_waits_and_what_is_still_open() {
    let mut files = watched();
    files.watch(number(2), Disk { name: "sdc".into(), ..stick() });
    files.take(event(1, 7, Happened { opened: true, written: true, ..CLOSED_WRITER }), &at(0));
    files.take(event(2, 7, Happened { opened: true, ..WRITTEN }), &at(0));
    files.take(event(3, 7, OPENED), &at(0));
    let mut other = event(4, 7, Happened { opened: true, read: true, ..CLOSED });
    other.file.volume = number(2);
    files.take(other, &at(0));
    files.unwatch(number(1), &at(1));
    let found: Vec<_> = told(&mut files).into_iter().map(line).collect();
    let written = |name: &str, bytes| (name.to_owned(), FileAccess::Written, 7, bytes);
    assert_eq!(found, [written("file1", Some(5_000)), written("file2", None)]);
    files.handle_timeout(&at(1_000));
    assert_eq!(told(&mut files).into_iter().map(line).map(|line| line.0).collect::<Vec<_>>(), ["file4"]);
}

#[test]
fn files_that_are_never_closed_take_bounded_memory_and_are_counted_when_they_give_way() {
    let mut files = watched();
    for inode in 0..(MAX_OPEN as u64 + 10) {
        files.take(
            event(inode, 7, if inode < 4 { Happened { opened: true, ..READ } } else { OPENED }),
            &at(0),
        );
    }
    assert_eq!((files.touches.len(), files.order.len()), (MAX_OPEN, MAX_OPEN));
    files.handle_timeout(&at(1_000));
    let [Event::UsbFilesUnseen(unseen)] = told(&mut files)[..] else { panic!("not counted") };
    assert_eq!((unseen.reason, unseen.count), (FilesUnseen::TooMany, Some(4)));
    for inode in 0..(MAX_OPEN as u64 + 10) {
        files.take(event(inode, 7, CLOSED), &at(2_000));
    }
    assert_eq!((files.touches.len(), files.order.len()), (0, 0));
}

#[test]
fn a_path_is_a_directory_and_a_name_of_which_the_ends_are_kept() {
    let place = |link: &[u8], deleted| {
        let place = Place::new(link, deleted);
        (place.directory.as_bytes().to_vec(), place.name.as_bytes().to_vec())
    };
    let bytes = |a: &[u8], b: &[u8]| (a.to_vec(), b.to_vec());
    assert_eq!(place(b"/media/USB/a\n\x1b[2J", false), bytes(b"/media/USB", b"a\n\x1b[2J"));
    assert_eq!(place(b"/mnt/a (deleted)", true), bytes(b"/mnt", b"a"));
    assert_eq!(place(b"/mnt/a (deleted)", false), bytes(b"/mnt", b"a (deleted)"));
    assert_eq!(place(b"/a", false), bytes(b"", b"a"));
    assert_eq!(place(b"", false), bytes(b"", b""));
    let long = [&b"/x/"[..], &[b'd'; 300], b"/", &[b'n'; 251], b".pdf"].concat();
    let (directory, name) = place(&long, false);
    assert_eq!((directory, name.len()), ([&b"..."[..], &[b'd'; 252]].concat(), 255));
    assert!(name.ends_with(b"n.pdf"));
    // Cut where another path begins: it does not look like a whole one.
    let other = [&b"/media/USB/"[..], &[b'a'; 200], b"/home/teacher/", &[b'b'; 241], b"/x"].concat();
    assert!(place(&other, false).0.starts_with(b"...me/teacher/b"));
}

#[test]
fn what_a_file_has_grown_by_is_known_when_it_is_closed() {
    let grown = |opened: Happened, first: (u64, u64), last: (u64, u64)| {
        let mut files = watched();
        let sized = |(bytes, allocated), happened| FileEvent { bytes, allocated, ..event(1, 7, happened) };
        assert_eq!(files.take(sized(first, opened), &at(0)), None);
        files.take(sized(last, CLOSED_WRITER), &at(1))
    };
    let written = Happened { opened: true, ..WRITTEN };
    assert_eq!(grown(written, (0, 0), (5_000, 8_192)), Some(5_000));
    assert_eq!(grown(written, (5_000, 8_192), (9_000, 12_288)), Some(4_000));
    assert_eq!(grown(written, (0, 0), (1 << 30, 4_096)), Some(4_096), "the rest is holes");
    assert_eq!(grown(written, (5_000, 8_192), (10, 4_096)), Some(0), "it was cut");
    assert_eq!(grown(WRITTEN, (0, 0), (5_000, 8_192)), None, "not seen from its beginning");
    assert_eq!(grown(OPENED, (0, 0), (5_000, 8_192)), None, "by somebody else");
}

#[test]
fn what_a_process_did_whose_end_was_lost_is_not_told_of_the_next_one_with_its_number() {
    let mut files = watched();
    let copied = |file: FileEvent| FileEvent { who: Some(Who { program: "cp".into(), uid: 1001 }), ..file };
    files.take(copied(event(1, 7, Happened { opened: true, ..WRITTEN })), &at(0));
    files.take(copied(event(2, 7, OPENED)), &at(1));
    files.lost(number(1), at(2).wall_ns, &at(3));
    files.handle_timeout(&at(1_500));
    let [Event::UsbFile(written), Event::UsbFilesUnseen(_)] = &told(&mut files)[..] else { panic!() };
    assert_eq!((&written.name, written.bytes, written.uid), (&"file1".into(), None, Some(1001)));
    // Gone before anybody could look.
    files.take(FileEvent { who: None, ..event(1, 7, Happened { opened: true, ..READ }) }, &at(60_000));
    files.take(FileEvent { who: None, ..event(1, 7, CLOSED) }, &at(60_001));
    files.handle_timeout(&at(61_001));
    let [Event::UsbFile(read)] = &told(&mut files)[..] else { panic!() };
    assert_eq!((read.access, read.uid, read.program.is_empty()), (FileAccess::Read, None, true));
}
