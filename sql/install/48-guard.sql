/*
 * Against losing undelivered events: the extension is not dropped, and a branch
 * is not deactivated, while there are any, unless softmobile.drop_undelivered is
 * on.  DROP EXTENSION is refused in C (src/guard.c).
 */

-- While the extension is being dropped the views are no longer whole, but the tables are.
CREATE FUNCTION softmobile.undelivered(branch text DEFAULT NULL, at_most integer DEFAULT 100000,
	OUT events bigint, OUT amount numeric, OUT complete boolean, OUT words text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
	WITH lane AS MATERIALIZED (
		SELECT l.branch_id, l.lane_id, l.log_id, a.settled, lower('{[1,)}'::int8multirange - a.settled) AS first_open
		FROM softmobile.outbox_lane l
			CROSS JOIN LATERAL (
				SELECT l.settled + coalesce(range_agg(b.members), '{}'::int8multirange) AS settled
				FROM softmobile.outbox_batch b
				WHERE b.lane_id = l.lane_id AND b.batch_id > l.settled_batch) AS a
		WHERE NOT l.closed),
	waiting AS (
		SELECT w.amount
		FROM (
			SELECT x.amount
			FROM softmobile.outbox_exception x
			WHERE x.state IN ('failed', 'queued') AND (undelivered.branch IS NULL OR x.branch_id = undelivered.branch)
			UNION ALL
			SELECT e.amount
			FROM lane l CROSS JOIN LATERAL (
				SELECT v.amount, v.branch_id
				FROM softmobile.outbox_event v
				WHERE v.lane_id = l.log_id AND v.seq >= l.first_open AND NOT l.settled @> v.seq
				OFFSET 0) AS e
			-- What an unregistered lane holds counts in its branch's lane, if that is there.
			WHERE (undelivered.branch IS NULL OR coalesce(l.branch_id, e.branch_id) = undelivered.branch)
				AND CASE WHEN l.branch_id IS NULL
					THEN NOT EXISTS (SELECT FROM lane o WHERE o.log_id = l.lane_id AND o.branch_id = e.branch_id)
					ELSE l.log_id = l.lane_id OR l.branch_id = e.branch_id END) AS w
		LIMIT at_most),
	counted AS (
		SELECT count(*) AS events, coalesce(sum(w.amount), 0) AS amount, count(*) < at_most AS complete FROM waiting w)
	SELECT c.events, c.amount, c.complete,
		CASE WHEN c.events = 0 THEN NULL
			WHEN NOT c.complete THEN format('at least %s events are undelivered (amount of these: %s)', c.events, c.amount)
			WHEN c.events = 1 THEN format('1 event is undelivered (amount: %s)', c.amount)
			ELSE format('%s events are undelivered (amount: %s)', c.events, c.amount) END
	FROM counted c;
END;
COMMENT ON FUNCTION softmobile.undelivered(text, integer) IS
'Events of a branch (NULL: of all) that central has not taken: those that wait, have failed or are in conflict, and the sum of their amounts. It looks no further than at_most events: complete says whether that was enough. words: the same as part of a sentence; NULL when there are none.';

CREATE FUNCTION softmobile.guard_branch() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
	words text := (softmobile.undelivered(old.branch_id)).words;
BEGIN
	-- Where nothing has loaded the library yet, the setting is unknown.
	IF words IS NOT NULL AND NOT coalesce(nullif(current_setting('softmobile.drop_undelivered', true), ''), 'off')::boolean THEN
		RAISE EXCEPTION 'cannot deactivate branch "%" while %', old.branch_id, words
			USING ERRCODE = 'object_in_use', DETAIL = 'They would wait until the branch is active again.',
				HINT = format('Send them first: call softmobile.sync_run(%L). To let them wait: SET softmobile.drop_undelivered = on (superusers only).', old.branch_id);
	END IF;
	RETURN new;
END
$$;
COMMENT ON FUNCTION softmobile.guard_branch() IS 'Trigger of softmobile.branch: refuses to deactivate a branch while events of it are undelivered (55006), unless softmobile.drop_undelivered is on.';
CREATE TRIGGER guard_active BEFORE UPDATE OF active ON softmobile.branch FOR EACH ROW
	WHEN (old.active AND NOT new.active) EXECUTE FUNCTION softmobile.guard_branch();
ALTER TABLE softmobile.branch ENABLE ALWAYS TRIGGER guard_active;

CREATE FUNCTION softmobile.load_guard() RETURNS void
LANGUAGE c AS 'MODULE_PATHNAME', 'softmobile_load_guard';
COMMENT ON FUNCTION softmobile.load_guard() IS 'Internal: loads the library, and with it what refuses to drop the extension.';

CREATE FUNCTION softmobile.guard_drop() RETURNS event_trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
	PERFORM softmobile.load_guard();
EXCEPTION WHEN undefined_file THEN
	-- The program is no longer installed; what is left of it may go.
	NULL;
END
$$;
COMMENT ON FUNCTION softmobile.guard_drop() IS 'Event trigger: has the library loaded before a command that may drop the extension, where it is not preloaded.';
CREATE EVENT TRIGGER softmobile_guard_drop ON ddl_command_start
	WHEN TAG IN ('DROP EXTENSION', 'DROP SCHEMA', 'DROP OWNED', 'DROP LANGUAGE')
	EXECUTE FUNCTION softmobile.guard_drop();
COMMENT ON EVENT TRIGGER softmobile_guard_drop IS 'So that the extension is not dropped while events are undelivered, also where it is not preloaded.';
ALTER EVENT TRIGGER softmobile_guard_drop ENABLE ALWAYS;
