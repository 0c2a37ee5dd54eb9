/* softmobile--1.0.sql: built from sql/install/, part by part. */

\echo Use "CREATE EXTENSION softmobile" to load this file. \quit

-- All names below are qualified; whatever is not found in pg_catalog then is nobody's trap. LOCAL: until the end of the script.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Whoever owns the schema, or may create in it, could put functions and operators among ours, now or later.
DO $$
DECLARE
	schema pg_namespace;
	planted text;
	stranger oid;
BEGIN
	SELECT n.* INTO schema FROM pg_namespace n WHERE n.nspname = 'softmobile';
	IF NOT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = schema.nspowner) THEN
		-- No error: a dump may bring it so, and is to be restored.
		RAISE WARNING 'schema softmobile belonged to %, who is no superuser', pg_get_userbyid(schema.nspowner)
			USING DETAIL = format('It belongs to %s now: its owner could replace the objects of the extension.', current_user);
		ALTER SCHEMA softmobile OWNER TO CURRENT_USER;
		SELECT n.* INTO schema FROM pg_namespace n WHERE n.nspname = 'softmobile';
	END IF;
	SELECT a.grantee INTO stranger FROM aclexplode(schema.nspacl) AS a WHERE a.privilege_type = 'CREATE' AND a.grantee <> schema.nspowner LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION '% may create objects in schema softmobile', CASE stranger WHEN 0 THEN 'everybody' ELSE 'role ' || pg_get_userbyid(stranger) END
			USING ERRCODE = 'insufficient_privilege', DETAIL = 'They would stand among those of the extension.',
				HINT = format('REVOKE CREATE ON SCHEMA softmobile FROM %s.', CASE stranger WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(stranger)) END);
	END IF;
	-- Everything that lies in a schema depends on it. What is a superuser's is no trap, nor is a sequence: those of lanes that a
	-- restore has brought outlive DROP EXTENSION.
	SELECT format('%s belongs to %s', pg_describe_object(d.classid, d.objid, 0), r.rolname) INTO planted
	FROM pg_depend d
		JOIN pg_shdepend o ON o.dbid = (SELECT b.oid FROM pg_database b WHERE b.datname = current_database()) AND o.classid = d.classid AND o.objid = d.objid AND o.objsubid = 0
			AND o.refclassid = 'pg_authid'::regclass AND o.deptype = 'o'
		JOIN pg_roles r ON r.oid = o.refobjid
	WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = schema.oid AND NOT r.rolsuper
		AND NOT EXISTS (SELECT FROM pg_class c WHERE d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind = 'S')
	LIMIT 1;
	IF FOUND THEN
		RAISE EXCEPTION 'schema softmobile holds objects of others'
			USING ERRCODE = 'insufficient_privilege', DETAIL = initcap(left(planted, 1)) || substr(planted, 2) || '.',
				HINT = 'Drop them, or move them to another schema: the extension''s schema is its own.';
	END IF;
END
$$;

REVOKE ALL ON SCHEMA softmobile FROM PUBLIC;
GRANT USAGE ON SCHEMA softmobile TO PUBLIC;
COMMENT ON SCHEMA softmobile IS
'Softmobile for PostgreSQL: outbox with lanes, delivery worker, central inbox. Names are described in README.md.';
