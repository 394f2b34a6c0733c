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

/// A zip archive of stored entries.
pub fn zip_of(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = Vec::new();
    let mut directory = Vec::new();
    for (name, data) in entries {
        let offset = file.len() as u32;
        let mut common = vec![20, 0, 0, 0, 0, 0, 0, 0, 33, 0];
        common.extend(crc32fast::hash(data).to_le_bytes());
        common.extend((data.len() as u32).to_le_bytes());
        common.extend((data.len() as u32).to_le_bytes());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(name.as_bytes());
        file.extend(*data);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(offset.to_le_bytes());
        directory.extend(name.as_bytes());
    }
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend((entries.len() as u16).to_le_bytes());
    file.extend((entries.len() as u16).to_le_bytes());
    file.extend((directory.len() as u32).to_le_bytes());
    file.extend(start.to_le_bytes());
    file.extend([0, 0]);
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
