//! Hostile peers at the server: whoever behaves is served meanwhile, and memory stays within its bound.

use std::time::Duration;

use netmon_lab::bench::delivery::attack::Behaviour;
use netmon_lab::bench::delivery::hostile::{Scene, Situation, memory_bound};

#[test]
fn beside_hostile_peers_a_good_agent_is_served_and_the_servers_memory_stays_within_its_bound() {
    let directory = tempfile::tempdir().unwrap();
    let scene = Scene::start(directory.path()).unwrap();
    for situation in [Situation::Enrolled, Situation::Unknown, Situation::Both] {
        let outcome = scene.play(situation, Duration::from_secs(4)).unwrap();
        // Each event waits for its ack before the next one; a busy machine makes them fewer.
        assert!(outcome.waits.len() > 20, "{situation:?}: {} acks", outcome.waits.len());
        assert!(outcome.attacks.values().all(|count| *count > 0), "{situation:?}: {:?}", outcome.attacks);
        println!("{situation:?}: {} acks, {:?}", outcome.waits.len(), outcome.attacks);
    }
    let (most, bound) = (scene.server.most_memory().unwrap(), memory_bound(1 + Behaviour::ALL.len() as u64));
    println!("{} MiB of at most {} MiB", most >> 20, bound >> 20);
    assert!(most <= bound, "{most} of {bound}");
    // A store that held nothing would take no memory either.
    assert!(scene.server.store_bytes() > 0);
}
