-- The branch's tables, as the original platform has them (shortened to what the demonstration needs).
CREATE TABLE sucursales (id text PRIMARY KEY, nombre text NOT NULL);
CREATE TABLE clientes (id integer PRIMARY KEY, nombre text NOT NULL, sucursal_id text NOT NULL);
CREATE TABLE devices (id integer PRIMARY KEY, modelo text NOT NULL, precio numeric(12,2) NOT NULL, existencia integer NOT NULL, sucursal_id text NOT NULL);
CREATE TABLE ventas (id bigserial PRIMARY KEY, folio text NOT NULL UNIQUE, cliente_id integer REFERENCES clientes, sucursal_id text NOT NULL,
	total numeric(12,2) NOT NULL, fecha timestamptz NOT NULL DEFAULT now());
CREATE TABLE detalle_ventas (id bigserial PRIMARY KEY, venta_id bigint NOT NULL REFERENCES ventas ON DELETE CASCADE, device_id integer NOT NULL REFERENCES devices,
	cantidad integer NOT NULL, precio numeric(12,2) NOT NULL, sucursal_id text NOT NULL);
CREATE TABLE inventory_movements (id bigserial PRIMARY KEY, device_id integer NOT NULL REFERENCES devices, tipo text NOT NULL, cantidad integer NOT NULL,
	motivo text NOT NULL, sucursal_id text NOT NULL, fecha timestamptz NOT NULL DEFAULT now());
CREATE TABLE sale_returns (id bigserial PRIMARY KEY, venta_id bigint NOT NULL REFERENCES ventas, total numeric(12,2) NOT NULL, sucursal_id text NOT NULL);
CREATE TABLE repair_orders (id bigserial PRIMARY KEY, cliente_id integer REFERENCES clientes, equipo text NOT NULL, estado text NOT NULL, sucursal_id text NOT NULL);
CREATE TABLE transfer_orders (id bigserial PRIMARY KEY, device_id integer NOT NULL REFERENCES devices, cantidad integer NOT NULL, origen_id text, destino_id text);
CREATE TABLE folios (terminal integer PRIMARY KEY, ultimo integer NOT NULL);

INSERT INTO sucursales VALUES ('norte', 'Sucursal Norte');
INSERT INTO clientes SELECT i, 'Cliente ' || i, 'norte' FROM generate_series(1, 200) AS i;
INSERT INTO devices SELECT i, 'Modelo ' || i, 1000 + i * 10, 100000, 'norte' FROM generate_series(1, 100) AS i;
INSERT INTO folios SELECT i, 0 FROM generate_series(1, 8) AS i;

SELECT softmobile.register_branch('norte', 'Sucursal Norte');
SELECT softmobile.attach('ventas', 'sale', branch_column => 'sucursal_id', folio_column => 'folio', amount_column => 'total');
SELECT softmobile.attach('detalle_ventas', 'sale_line', branch_column => 'sucursal_id');
SELECT softmobile.attach('inventory_movements', 'inventory_movement', branch_column => 'sucursal_id', reason_column => 'motivo');
SELECT softmobile.attach('devices', 'device', branch_column => 'sucursal_id', initial => 'snapshot');
SELECT softmobile.attach('clientes', 'customer', branch_column => 'sucursal_id', initial => 'snapshot');
SELECT softmobile.attach('sale_returns', 'sale_return', branch_column => 'sucursal_id', amount_column => 'total');
SELECT softmobile.attach('repair_orders', 'repair_order', branch_column => 'sucursal_id');
SELECT softmobile.attach('transfer_orders', 'transfer_order', branch_column => 'origen_id', branch_fallback_column => 'destino_id');
