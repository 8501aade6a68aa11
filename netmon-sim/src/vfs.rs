//! SQLite on a [`Disk`]: its interface to a file system ("VFS"), as far as the store needs it.
//!
//! One file system is registered with SQLite for the life of this process; [`mount`] gives a disk a directory in it. One
//! connection at a time uses a file: locks are always granted, and the shared memory of write-ahead logging belongs to
//! the connection. That is also what a killed process leaves of it: nothing.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use rusqlite::ffi;

use crate::disk::{Disk, DiskError, File};

/// The file system's name at SQLite.
pub const NAME: &str = "netmon-sim";
const C_NAME: &CStr = c"netmon-sim";

/// As SQLite's own file system for Unix has it.
const SECTOR: c_int = 4096;
/// Longest path: a number and a file's name.
const MAX_PATH: c_int = 128;
/// Bytes of one part of the shared memory; SQLite always asks for this much.
const REGION: usize = 32 * 1024;

/// The disks by their directories' numbers, each with the process that mounted it: what is left of a killed one does
/// nothing any more.
static DISKS: Mutex<BTreeMap<u64, (Disk, u64)>> = Mutex::new(BTreeMap::new());

fn disks() -> MutexGuard<'static, BTreeMap<u64, (Disk, u64)>> {
    DISKS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk's directory; gone with this.
#[derive(Debug)]
pub struct Mount(u64);

impl Mount {
    /// Path of a file on the disk, for [`NAME`].
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/{}/{name}", self.0))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        disks().remove(&self.0);
    }
}

/// Gives a disk a directory that SQLite finds.
pub fn mount(disk: &Disk) -> Mount {
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| {
        let vfs = Box::leak(Box::new(VFS.0));
        // SAFETY: `vfs` is never freed nor touched by us again, its name is static, and its functions are those below.
        let result = unsafe { ffi::sqlite3_vfs_register(vfs, 0) };
        assert_eq!(result, ffi::SQLITE_OK, "SQLite takes a file system unless it has no memory");
    });
    let mut disks = disks();
    let number = disks.last_key_value().map_or(1, |(newest, _)| newest + 1);
    disks.insert(number, (disk.clone(), disk.life()));
    Mount(number)
}

/// The disk and the file that a path names. `None`: no disk of ours, or of a process that was killed.
fn find(path: &CStr) -> Option<(Disk, &str)> {
    let (number, name) = path.to_str().ok()?.strip_prefix('/')?.split_once('/')?;
    let (disk, life) = disks().get(&number.parse().ok()?)?.clone();
    (disk.life() == life).then_some((disk, name))
}

/// What SQLite has open. It allocates this many bytes and lets [`open`] fill them.
#[repr(C)]
struct Handle {
    /// Must be first: SQLite knows this part.
    base: ffi::sqlite3_file,
    /// From [`Box::into_raw`]; freed by [`close`].
    open: *mut Open,
}

struct Open {
    disk: Disk,
    file: File,
    /// The process that opened it.
    life: u64,
    /// The shared memory. Boxes: SQLite holds pointers into them while the list grows.
    regions: Vec<Box<[u64; REGION / 8]>>,
}

impl Open {
    /// Does it still belong to a process that lives?
    fn check(&self) -> Result<(), DiskError> {
        if self.disk.life() == self.life { Ok(()) } else { Err(DiskError::Io) }
    }
}

/// # Safety
/// `file` is a handle that [`open`] filled and [`close`] did not see yet, and nobody else uses it now: SQLite's rules for
/// a connection that one thread uses at a time (`SQLITE_OPEN_NO_MUTEX`, and [`rusqlite::Connection`] is not `Sync`).
unsafe fn opened<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Open {
    // SAFETY: by the contract `file` points to a `Handle` (its first field is the `sqlite3_file`), whose `open` is valid
    // and not aliased.
    unsafe { &mut *(*file.cast::<Handle>()).open }
}

fn code(result: Result<(), DiskError>, io_error: c_int) -> c_int {
    match result {
        Ok(()) => ffi::SQLITE_OK,
        Err(DiskError::Full) => ffi::SQLITE_FULL,
        Err(DiskError::Io | DiskError::NotFound) => io_error,
    }
}

unsafe extern "C" fn open(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let handle = file.cast::<Handle>();
    // SAFETY: SQLite gives `szOsFile` bytes, suitably aligned. No methods: it will not call `close` after a failure.
    unsafe { (*handle).base.pMethods = std::ptr::null() };
    let opened = if name.is_null() {
        // A temporary file: it has no name and no disk that could fail.
        Some((Disk::new(0), File::default()))
    } else {
        // SAFETY: a file name that SQLite gives is a C string that lives as long as the call.
        let path = unsafe { CStr::from_ptr(name) };
        find(path).and_then(|(disk, name)| {
            let file = disk.open(name, flags & ffi::SQLITE_OPEN_CREATE != 0).ok()?;
            Some((disk, file))
        })
    };
    let Some((disk, opened)) = opened else { return ffi::SQLITE_CANTOPEN };
    let life = disk.life();
    let open = Box::new(Open { disk, file: opened, life, regions: Vec::new() });
    // SAFETY: as above; where `out_flags` is there, it may be written.
    unsafe {
        (*handle).open = Box::into_raw(open);
        (*handle).base.pMethods = &METHODS;
        if let Some(out_flags) = out_flags.as_mut() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(_vfs: *mut ffi::sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    // SAFETY: a C string of SQLite's.
    let path = unsafe { CStr::from_ptr(name) };
    let Some((disk, name)) = find(path) else { return ffi::SQLITE_IOERR_DELETE };
    match disk.remove(name, sync != 0) {
        Err(DiskError::NotFound) => ffi::SQLITE_IOERR_DELETE_NOENT,
        result => code(result, ffi::SQLITE_IOERR_DELETE),
    }
}

unsafe extern "C" fn access(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: a C string of SQLite's.
    let path = unsafe { CStr::from_ptr(name) };
    let length = find(path).and_then(|(disk, name)| disk.length(name));
    let is_there = match flags {
        // As on Unix: an empty file is as good as none.
        ffi::SQLITE_ACCESS_EXISTS => length.is_some_and(|length| length > 0),
        _ => length.is_some(),
    };
    // SAFETY: SQLite wants the answer there.
    unsafe { *out = c_int::from(is_there) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_path(
    _vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    length: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: a C string of SQLite's.
    let bytes = unsafe { CStr::from_ptr(name) }.to_bytes_with_nul();
    if bytes.len() > usize::try_from(length).unwrap_or_default() {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: `out` has `length` bytes, no fewer than are copied, and is no part of the name.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().cast(), out, bytes.len()) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn randomness(_vfs: *mut ffi::sqlite3_vfs, length: c_int, out: *mut c_char) -> c_int {
    // SAFETY: `out` has `length` bytes.
    unsafe { std::ptr::write_bytes(out, 0, usize::try_from(length).unwrap_or_default()) };
    length
}

unsafe extern "C" fn sleep(_vfs: *mut ffi::sqlite3_vfs, microseconds: c_int) -> c_int {
    microseconds
}

unsafe extern "C" fn time(_vfs: *mut ffi::sqlite3_vfs, days: *mut f64) -> c_int {
    // SAFETY: SQLite wants the answer there. Noon of 2000-01-01 as a Julian day: nothing in the store asks for it.
    unsafe { *days = 2_451_545.0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn last_error(_vfs: *mut ffi::sqlite3_vfs, _length: c_int, _out: *mut c_char) -> c_int {
    0
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: `open` made it with `Box::into_raw`, and after `close` SQLite does not use the handle any more.
    drop(unsafe { Box::from_raw((*file.cast::<Handle>()).open) });
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    out: *mut c_void,
    length: c_int,
    offset: i64,
) -> c_int {
    // SAFETY: the contract of `opened` is SQLite's for this call; `out` has `length` bytes, which nobody else uses. They
    // are set first, as the slice must not show memory that never was.
    let (open, bytes) = unsafe {
        let length = usize::try_from(length).unwrap_or_default();
        std::ptr::write_bytes(out.cast::<u8>(), 0, length);
        (opened(file), std::slice::from_raw_parts_mut(out.cast::<u8>(), length))
    };
    let read = open.check().and_then(|()| open.disk.read(&open.file, offset as usize, bytes));
    match read {
        Ok(read) if read == bytes.len() => ffi::SQLITE_OK,
        // The rest is zeros, as SQLite wants it.
        Ok(_) => ffi::SQLITE_IOERR_SHORT_READ,
        Err(_) => ffi::SQLITE_IOERR_READ,
    }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    bytes: *const c_void,
    length: c_int,
    offset: i64,
) -> c_int {
    // SAFETY: as in `read`; SQLite has filled the bytes.
    let (open, bytes) = unsafe {
        let length = usize::try_from(length).unwrap_or_default();
        (opened(file), std::slice::from_raw_parts(bytes.cast::<u8>(), length))
    };
    let written = open.check().and_then(|()| open.disk.write(&open.file, offset as usize, bytes));
    code(written, ffi::SQLITE_IOERR_WRITE)
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, length: i64) -> c_int {
    // SAFETY: SQLite's contract for this call.
    let open = unsafe { opened(file) };
    let cut = open.check().and_then(|()| open.disk.truncate(&open.file, length as usize));
    code(cut, ffi::SQLITE_IOERR_TRUNCATE)
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: SQLite's contract for this call.
    let open = unsafe { opened(file) };
    code(open.check().and_then(|()| open.disk.sync(&open.file)), ffi::SQLITE_IOERR_FSYNC)
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, out: *mut i64) -> c_int {
    // SAFETY: SQLite's contract for this call; it wants the answer in `out`.
    unsafe {
        let open = opened(file);
        *out = open.disk.size(&open.file) as i64;
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn lock(_file: *mut ffi::sqlite3_file, _level: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn is_reserved(_file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: SQLite wants the answer there.
    unsafe { *out = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn control(_file: *mut ffi::sqlite3_file, _what: c_int, _argument: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_file: *mut ffi::sqlite3_file) -> c_int {
    SECTOR
}

unsafe extern "C" fn characteristics(_file: *mut ffi::sqlite3_file) -> c_int {
    // What a write does not name, it does not damage. SQLite's own file system for Unix says so, too.
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn shm_map(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: SQLite's contract for this call.
    let open = unsafe { opened(file) };
    let region = usize::try_from(region).unwrap_or_default();
    if usize::try_from(size) != Ok(REGION) {
        return ffi::SQLITE_IOERR_SHMMAP;
    }
    while extend != 0 && open.regions.len() <= region {
        open.regions.push(Box::new([0; REGION / 8]));
    }
    let found = open.regions.get_mut(region);
    // SAFETY: SQLite wants the answer there. The region lives until `shm_unmap` or `close`, as SQLite's rules say, and
    // nobody but SQLite looks into it.
    unsafe { *out = found.map_or(std::ptr::null_mut(), |region| region.as_mut_ptr().cast()) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn shm_lock(
    _file: *mut ffi::sqlite3_file,
    _offset: c_int,
    _n: c_int,
    _flags: c_int,
) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn shm_barrier(_file: *mut ffi::sqlite3_file) {}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, _delete: c_int) -> c_int {
    // SAFETY: SQLite's contract for this call; it has no pointer into the regions any more.
    unsafe { opened(file) }.regions.clear();
    ffi::SQLITE_OK
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    // 2: with shared memory.
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(is_reserved),
    xFileControl: Some(control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

struct Vfs(ffi::sqlite3_vfs);

// SAFETY: its pointers are null or to static data, and only a copy of it is ever changed.
unsafe impl Sync for Vfs {}

static VFS: Vfs = Vfs(ffi::sqlite3_vfs {
    iVersion: 1,
    szOsFile: size_of::<Handle>() as c_int,
    mxPathname: MAX_PATH,
    pNext: std::ptr::null_mut(),
    zName: C_NAME.as_ptr(),
    pAppData: std::ptr::null_mut(),
    xOpen: Some(open),
    xDelete: Some(delete),
    xAccess: Some(access),
    xFullPathname: Some(full_path),
    // No extensions are loaded.
    xDlOpen: None,
    xDlError: None,
    xDlSym: None,
    xDlClose: None,
    xRandomness: Some(randomness),
    xSleep: Some(sleep),
    xCurrentTime: Some(time),
    xGetLastError: Some(last_error),
    xCurrentTimeInt64: None,
    xSetSystemCall: None,
    xGetSystemCall: None,
    xNextSystemCall: None,
});

#[cfg(test)]
mod tests {
    use netmon_server::store::Store;

    use super::*;
    use crate::disk::Trouble;

    fn count(store: &Store) -> i64 {
        store.conn().query_row("SELECT count(*) FROM tokens", [], |row| row.get(0)).unwrap()
    }

    fn insert(store: &mut Store, id: u8) -> rusqlite::Result<()> {
        store.write(|tx| {
            tx.execute("INSERT INTO tokens VALUES (?1, zeroblob(5000), 0, 0, 1, 1)", [[id].as_slice()])
        })?;
        Ok(())
    }

    fn open_again(disk: &Disk) -> Store {
        Store::open_with(&mount(disk).path("store"), NAME).unwrap()
    }

    #[test]
    fn the_store_writes_ahead_and_what_it_commits_outlasts_a_power_cut() {
        let mut lossy = 0;
        for seed in 0..50 {
            let disk = Disk::new(seed);
            let mounted = mount(&disk);
            let mut store = Store::create_with(&mounted.path("store"), NAME).unwrap();
            insert(&mut store, 1).unwrap();
            assert!(
                disk.length("store-wal").is_some_and(|length| length > 5000),
                "write-ahead logging is on"
            );
            insert(&mut store, 2).unwrap();
            // It dies somewhere in the third one, or in the checkpoint after it.
            disk.set_trouble(Trouble { dies_in: Some(seed), ..Trouble::default() });
            store.conn().pragma_update(None, "wal_autocheckpoint", 1).unwrap();
            let third = insert(&mut store, 3).is_ok();
            disk.cut_power();
            drop(store);
            let store = open_again(&disk);
            assert!((2 + i64::from(third)..=3).contains(&count(&store)), "seed {seed}");
            let check: String =
                store.conn().query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            assert_eq!(check, "ok");
            lossy += disk.mishaps().lossy_cuts;
        }
        assert!(lossy > 5, "{lossy}");
    }

    #[test]
    fn on_a_disk_whose_fsync_does_nothing_commits_are_lost() {
        let lost = (0..50).filter(|seed| {
            let disk = Disk::new(*seed);
            let mounted = mount(&disk);
            drop(Store::create_with(&mounted.path("store"), NAME).unwrap());
            disk.skip_syncs();
            let mut store = Store::open_with(&mounted.path("store"), NAME).unwrap();
            insert(&mut store, 1).unwrap();
            disk.cut_power();
            drop(store);
            let mounted = mount(&disk);
            let left = Store::open_with(&mounted.path("store"), NAME);
            left.map_or(true, |store| count(&store) == 0)
        });
        assert!(lost.count() > 5);
    }

    #[test]
    fn what_is_left_of_a_killed_process_does_not_touch_the_disk() {
        let disk = Disk::new(1);
        let mounted = mount(&disk);
        let mut store = Store::create_with(&mounted.path("store"), NAME).unwrap();
        insert(&mut store, 1).unwrap();
        disk.kill();
        insert(&mut store, 2).unwrap_err();
        let log = disk.length("store-wal");
        drop(store);
        assert_eq!(disk.length("store-wal"), log);
        assert_eq!(count(&open_again(&disk)), 1);
    }
}
