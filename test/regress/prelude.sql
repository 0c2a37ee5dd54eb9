-- What every regression test begins with: the extension, fresh; a shop of one branch; and how to look at what was captured.
SET client_min_messages = error;
SET softmobile.drop_undelivered = on;
DROP EXTENSION IF EXISTS softmobile CASCADE;
DROP SCHEMA IF EXISTS shop CASCADE;
CREATE EXTENSION softmobile;
CREATE SCHEMA shop;
RESET client_min_messages;
RESET softmobile.drop_undelivered;
SET search_path = shop;
-- Where many rows would only repeat, \pset tells nothing: no row counts, no alignment.
\pset footer off
SELECT softmobile.register_branch('S1', 'Centro') \g /dev/null
SET softmobile.branch_id = 'S1';

-- All events, first to last within each lane.
CREATE VIEW events AS
SELECT e.id AS event, l.priority AS lane, row_number() OVER (ORDER BY array_position('{HIGH,NORMAL,LOW}', l.priority), l.epoch_no, l.lane_id, e.seq) AS place,
	e.op, t.entity_type AS entity, e.entity_id AS id, coalesce(l.branch_id, e.branch_id) AS branch, e.actor, e.reason, e.folio, e.amount, e.payload
FROM softmobile.outbox_event e JOIN softmobile.outbox_entity t USING (entity_no) JOIN softmobile.outbox_lane l USING (lane_id);

-- The events since the last call.
CREATE TABLE seen (event uuid PRIMARY KEY);
CREATE FUNCTION fresh() RETURNS SETOF events LANGUAGE sql AS $$
	WITH new AS (INSERT INTO seen SELECT event FROM events EXCEPT SELECT event FROM seen RETURNING event)
	SELECT e.* FROM events e JOIN new USING (event) ORDER BY e.place
$$;

-- What a command's failure tells.
CREATE FUNCTION failure(command text, OUT state text, OUT message text, OUT detail text, OUT hint text) LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE command;
	message := 'no failure';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
END
$$;
