//! PyTorch files made byte by byte, so that they can be wrong in chosen places.

/// The end of a storage reference, and the offset of the tensor in it.
const STORAGE_END: &[u8] = b"tQK\x00";

/// A pickled dictionary and the one storage its tensors refer to.
pub struct Pickled {
    pub pickle: Vec<u8>,
    pub storage: Vec<u8>,
}

impl Pickled {
    /// `{name: tensor}` as `torch.save` pickles it, over a float32 storage of `values`.
    pub fn tensor(name: &str, values: &[f32], shape: &[u32], stride: &[u32]) -> Self {
        let mut p = vec![0x80, 2, b'}'];
        text(&mut p, name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(b"ctorch\nFloatStorage\n");
        text(&mut p, "0");
        text(&mut p, "cpu");
        number(&mut p, values.len() as u32);
        p.extend(STORAGE_END);
        for extents in [shape, stride] {
            p.push(b'(');
            extents.iter().for_each(|&extent| number(&mut p, extent));
            p.push(b't');
        }
        p.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
        Self {
            pickle: p,
            storage: values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }

    /// A pickle of its own making and no storage.
    pub fn raw(pickle: &[u8]) -> Self {
        Self {
            pickle: pickle.to_vec(),
            storage: Vec::new(),
        }
    }
}

fn text(pickle: &mut Vec<u8>, text: &str) {
    pickle.push(b'X');
    pickle.extend((text.len() as u32).to_le_bytes());
    pickle.extend(text.as_bytes());
}

fn number(pickle: &mut Vec<u8>, number: u32) {
    pickle.push(b'J');
    pickle.extend(number.to_le_bytes());
}

/// The zip container of PyTorch 1.6 and later.
pub fn zip(pickled: &Pickled) -> Vec<u8> {
    zip_of(&[
        ("model/data.pkl", &pickled.pickle),
        ("model/data/0", &pickled.storage),
    ])
}

/// An entry of a zip archive, as its headers describe it.
#[derive(Clone, Copy)]
pub struct Entry<'a> {
    pub name: &'a str,
    pub data: &'a [u8],
    /// 0 stored, 8 deflated.
    pub method: u16,
    /// 1 encrypted.
    pub flags: u16,
    /// What it is said to have unpacked, and in the file.
    pub size: u32,
    pub stored_size: u32,
}

impl<'a> Entry<'a> {
    pub fn stored(name: &'a str, data: &'a [u8]) -> Self {
        Self {
            name,
            data,
            method: 0,
            flags: 0,
            size: data.len() as u32,
            stored_size: data.len() as u32,
        }
    }
}

/// A zip archive of stored entries.
pub fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let stored = entries.iter().map(|(name, data)| Entry::stored(name, data));
    archive(&stored.collect::<Vec<_>>())
}

/// A zip archive.
pub fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    for entry in entries {
        let offset = file.len() as u32;
        let mut common = vec![20, 0];
        common.extend(entry.flags.to_le_bytes());
        common.extend(entry.method.to_le_bytes());
        common.extend([0, 0, 33, 0]);
        common.extend(crc32fast::hash(entry.data).to_le_bytes());
        common.extend(entry.stored_size.to_le_bytes());
        common.extend(entry.size.to_le_bytes());
        common.extend((entry.name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(entry.name.as_bytes());
        file.extend(entry.data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(entry.name.as_bytes());
    }
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(end(entries.len() as u16, directory.len() as u32, start));
    file
}

/// The record that an archive ends in.
fn end(entries: u16, directory_bytes: u32, directory_at: u32) -> Vec<u8> {
    let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
    end.extend(entries.to_le_bytes());
    end.extend(entries.to_le_bytes());
    end.extend(directory_bytes.to_le_bytes());
    end.extend(directory_at.to_le_bytes());
    end.extend([0, 0]);
    end
}

/// The end of an archive of `size` bytes, with a 64-bit record that claims `entries` entries from the
/// first gibibyte on.
pub fn end_64(size: u64, entries: u64) -> Vec<u8> {
    let record_at = size - (56 + 20 + 22);
    let mut file = b"PK\x06\x06".to_vec();
    file.extend(44_u64.to_le_bytes());
    file.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(entries.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend((46 * entries).to_le_bytes());
    file.extend((1_u64 << 30).to_le_bytes());
    file.extend(b"PK\x06\x07\0\0\0\0");
    file.extend(record_at.to_le_bytes());
    file.extend([1, 0, 0, 0]);
    file.extend(end(u16::MAX, u32::MAX, u32::MAX));
    file
}

/// The stream of pickles that PyTorch before 1.6 wrote.
pub fn legacy(pickled: &Pickled) -> Vec<u8> {
    let mut file = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.".to_vec();
    file.extend(b"\x80\x02M\xe9\x03.");
    file.extend(b"\x80\x02}");
    text(&mut file, "little_endian");
    file.extend(b"\x88s.");
    // The storage reference of this container has one more field, a view or none.
    let end = STORAGE_END.len();
    match pickled
        .pickle
        .windows(end)
        .position(|part| part == STORAGE_END)
    {
        Some(place) => {
            let (head, tail) = pickled.pickle.split_at(place);
            file.extend([head, b"N", tail].concat());
        }
        None => file.extend(&pickled.pickle),
    }
    file.extend(b"\x80\x02]");
    text(&mut file, "0");
    file.extend(b"a.");
    file.extend((pickled.storage.len() as u64 / 4).to_le_bytes());
    file.extend(&pickled.storage);
    file
}
