export default { render({ model, el }) { model.set("ready", true); model.save_changes(); } };
export function wake() {}
